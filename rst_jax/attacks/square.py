"""Square Attack (Andriushchenko et al., 2020): random search with square changes; needs logits only.

Linf: a square of each channel moves by 2 eps up or down. L2: the change within one window gives its norm to a new
pattern in another. A proposal is kept where it lowers the margin. The squares shrink as the search goes on.
"""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rst_jax.attacks.attack import Found, Problem, step_keys
from rst_jax.losses import margin
from rst_jax.threat import l2_norm, per_example

_HALVED_AFTER = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)  # queries


class SquareState(NamedTuple):
    """Of each example: the best image and its margin."""

    found: Found
    best: jax.Array
    margin: jax.Array


class Proposal(NamedTuple):
    """What a step draws for each example.

    Attributes:
      corner: int32 [N, 2], first row and column of the square; other: of the window that L2 empties.
      signs: [N, C], of each channel.
      upright: bool [N], how the L2 pattern lies.
    """

    corner: jax.Array
    other: jax.Array
    signs: jax.Array
    upright: jax.Array


@dataclasses.dataclass(frozen=True)
class Square:
    """Square Attack on the margin.

    Attributes:
      steps: queries after the first.
      rounds: restarts.
      share: of the image that the first squares cover (p in the paper).
      faithful: as published, squares never reach the last row and column; here they do. Everything that is drawn is
        drawn for each example by itself in both, where the authors' code draws one place for a batch.
    """

    steps: int = 5000
    rounds: int = 1
    share: float = 0.8
    faithful: bool = False
    name = "Square"
    targeted = False
    needs_gradient = False
    rests = True

    def start(self, p: Problem, noise: jax.Array | None = None) -> SquareState:
        """Begin with vertical stripes of +-eps (Linf) or tiles of patterns (L2); `noise` stands in for the draw."""
        if noise is None:
            draw = _stripes if p.threat.norm == "linf" else _tiles
            noise = jax.vmap(lambda key: draw(key, p.images.shape[1:], p.images.dtype))(p.keys)
        x = p.threat.clip(p.images + p.threat.eps * p.threat.unit(noise))
        logits = p.logits_fn(x)
        return SquareState(Found.nothing(p).seen(p, x, logits), x, margin(logits, p.labels))

    def sides(self, shape: tuple[int, ...], norm: str) -> list[int]:
        """The side of the square of each step, in pixels, for images [H, W, C]."""
        h, w, _ = shape
        found = []
        for i in range(self.steps):
            share = self.share / 2 ** sum(i > after for after in _HALVED_AFTER)
            side = max(round(math.sqrt(share * h * w)), 1 if norm == "linf" else 3)
            side += norm == "l2" and side % 2 == 0
            found.append(min(side, h, w))
        return found

    def draw(self, p: Problem, i: jax.Array) -> Proposal:
        """The proposal of step i, from each example's key."""
        h, w, c = p.images.shape[1:]
        side = jnp.asarray(self.sides((h, w, c), p.threat.norm), jnp.int32)[i]
        places = jnp.stack([h - side, w - side]) + (0 if self.faithful else 1)

        def one(key: jax.Array) -> Proposal:
            where, sign, lie = jax.random.split(key, 3)
            corners = jnp.floor(jax.random.uniform(where, (2, 2)) * places.astype(jnp.float32)).astype(jnp.int32)
            signs = jax.random.rademacher(sign, (c,), p.images.dtype)
            return Proposal(corners[0], corners[1], signs, jax.random.bernoulli(lie))

        return jax.vmap(one)(step_keys(p, i))

    def step(self, p: Problem, s: SquareState, i: jax.Array, proposal: Proposal | None = None) -> SquareState:
        """One query; `proposal` stands in for the draw."""
        drawn = self.draw(p, i) if proposal is None else proposal
        sides = self.sides(p.images.shape[1:], p.threat.norm)
        window = _window(drawn.corner, jnp.asarray(sides, jnp.int32)[i], p.images)
        if p.threat.norm == "linf":
            step = 2 * p.threat.eps * drawn.signs[:, None, None, :]
            x = p.threat.project(s.best + jnp.where(window, step, 0), p.images)
        else:
            emptied = _window(drawn.other, jnp.asarray(sides, jnp.int32)[i], p.images)
            kinds = sorted(set(sides))
            kind = jnp.asarray([kinds.index(side) for side in sides], jnp.int32)[i]
            patterns = jnp.asarray(np.stack([_canvas(side, p.images.shape[1:3]) for side in kinds]), s.best.dtype)
            pattern = _placed(patterns[kind], drawn.corner, drawn.upright)[..., None] * drawn.signs[:, None, None, :]
            delta = _exchanged(s.best - p.images, window, emptied, pattern, p.threat.eps)
            x = p.threat.clip(p.images + p.threat.eps * p.threat.unit(delta))
        logits = p.logits_fn(x)
        now = margin(logits, p.labels)
        better = (now < s.margin) | (now <= 0)
        return SquareState(
            s.found.seen(p, x, logits),
            jnp.where(per_example(better, x), x, s.best),
            jnp.where(better, now, s.margin),
        )


def _window(corner: jax.Array, side: jax.Array, images: jax.Array) -> jax.Array:
    """Which pixels lie in the square at `corner`: bool [N, H, W, 1]."""
    inside = []
    for axis, length in enumerate(images.shape[1:3]):
        place = jnp.arange(length, dtype=jnp.int32)[None] - corner[:, axis, None]
        inside.append((place >= 0) & (place < side))
    return (inside[0][:, :, None] & inside[1][:, None, :])[..., None]


def _exchanged(
    delta: jax.Array, window: jax.Array, emptied: jax.Array, pattern: jax.Array, eps: jax.Array | float
) -> jax.Array:
    """Empty one window and give its norm, and what is left of eps, to the pattern in the other (their Algorithm 3)."""
    square = jnp.square(delta)

    def norm(values: jax.Array) -> jax.Array:
        return jnp.sqrt(jnp.sum(values, axis=(1, 2), keepdims=True))  # of each channel

    unused = jnp.maximum(eps**2 - jnp.square(per_example(l2_norm(delta), delta)), 0) / delta.shape[-1]
    norms = jnp.sqrt(unused + jnp.sum(jnp.where(window | emptied, square, 0), axis=(1, 2), keepdims=True))
    new = jnp.where(window, pattern + delta / (norm(jnp.where(window, square, 0)) + 1e-12), 0)
    new = new / (norm(jnp.square(new)) + 1e-12) * norms
    return jnp.where(window, new, jnp.where(emptied, 0, delta))


def _stripes(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
    _, w, c = shape
    return jnp.broadcast_to(jax.random.rademacher(key, (1, w, c), dtype), shape)


def _tiles(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
    """Five by five tiles of patterns, each with its own sign in every channel and its own way to lie."""
    h, w, c = shape
    side = max(h // 5, 1)
    first = (h - 5 * side) // 2
    rows, columns = (np.arange(n) - first for n in (h, w))
    inside = ((rows >= 0) & (rows // side < h // side))[:, None] & ((columns >= 0) & (columns // side < w // side))[
        None
    ]
    across = max(w // side, 1)
    tile = np.where(inside, (rows // side)[:, None] * across + (columns // side)[None], 0)
    upright = pattern(side)[rows[:, None] % side, columns[None] % side]
    lying = pattern(side).T[rows[:, None] % side, columns[None] % side]
    signs_key, lie_key = jax.random.split(key)
    tiles = max(h // side, 1) * across
    signs = jax.random.rademacher(signs_key, (tiles, c), dtype)[tile]
    lies = jax.random.bernoulli(lie_key, shape=(tiles,))[tile]
    values = jnp.where(lies, jnp.asarray(upright * inside, dtype), jnp.asarray(lying * inside, dtype))
    return values[..., None] * signs


def pattern(side: int) -> np.ndarray:
    """The L2 pattern of a square: a bump above a dent, of norm one in all: float64 [side, side]."""
    upper = side // 2
    whole = np.concatenate([_bump(upper, side), -_bump(side - upper, side)])
    return whole / np.linalg.norm(whole)


def _bump(height: int, width: int) -> np.ndarray:
    """At Chebyshev distance m from the middle: the sum of 1 / (k + 1)^2 from k = m on, over its norm (eq. 6)."""
    if not height:
        return np.zeros((0, width))
    far = max(height // 2, width // 2) + 1
    tails = np.append(np.cumsum(1 / np.arange(far, 0, -1.0) ** 2)[::-1], 0)
    rows, columns = np.abs(np.arange(height) - height // 2), np.abs(np.arange(width) - width // 2)
    bump = tails[np.minimum(np.maximum(rows[:, None], columns[None]), far)]
    return bump / np.linalg.norm(bump)


def _canvas(side: int, shape: tuple[int, ...]) -> np.ndarray:
    """The pattern and its transpose on empty canvases of twice the image, from the middle on: [2, 2 H, 2 W]."""
    h, w = shape
    canvas = np.zeros((2, 2 * h, 2 * w))
    canvas[0, h : h + side, w : w + side] = pattern(side)
    canvas[1, h : h + side, w : w + side] = pattern(side).T
    return canvas


def _placed(canvas: jax.Array, corner: jax.Array, upright: jax.Array) -> jax.Array:
    """The pattern at each example's corner: [N, H, W]."""
    h, w = canvas.shape[1] // 2, canvas.shape[2] // 2

    def one(corner: jax.Array, upright: jax.Array) -> jax.Array:
        lies = jnp.where(upright, 0, 1).astype(corner.dtype)
        return jax.lax.dynamic_slice(canvas, (lies, h - corner[0], w - corner[1]), (1, h, w))[0]

    return jax.vmap(one)(corner, upright)
