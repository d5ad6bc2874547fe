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

from rst_jax.attacks.attack import Attack, Found, Problem, uniform
from rst_jax.losses import margin
from rst_jax.ranges import Positive, ShareAboveZero
from rst_jax.threat import Array, l2_norm, per_example

_HALVED_AFTER = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)  # queries


class SquareState(NamedTuple):
    """Of each example: the best image and its margin."""

    found: Found
    best: Array
    margin: Array


@dataclasses.dataclass(frozen=True)
class Square(Attack):
    """Square Attack on the margin.

    Attributes:
      steps: queries after the first.
      rounds: restarts.
      share: of the image that the first squares cover (p in the paper).
      faithful: as published, squares never reach the last row and column; here they do. Everything that is sampled is
        sampled for each example by itself in both, where the authors' code samples one place for a batch.
    """

    steps: Positive = 5000
    rounds: Positive = 1
    share: ShareAboveZero = 0.8
    faithful: bool = False
    name = "Square"
    needs_gradient = False

    def sides(self, shape: tuple[int, ...], norm: str) -> list[int]:
        """The side of the square of each step, in pixels, for images [H, W, C]; the first one looks and has none."""
        h, w, _ = shape
        found = [0]
        for i in range(self.steps):
            share = self.share / 2 ** sum(i > after for after in _HALVED_AFTER)
            side = max(round(math.sqrt(share * h * w)), 1 if norm == "linf" else 3)
            side += norm == "l2" and side % 2 == 0
            found.append(min(side, h, w))
        return found

    def sample(self, p: Problem) -> tuple[np.ndarray, np.ndarray]:
        """A pattern of the whole image; for each step uniform samples: signs, places and, under L2, a way to lie."""
        h, w, c = p.images.shape[1:]
        l2 = p.threat.norm == "l2"
        count, values = (math.prod(_tiling(h, w)), c + 5) if l2 else (w, c + 2)
        sampled = uniform(p.keys, (count + self.passes, values))
        first, each = sampled[:, :count], sampled[:, count:]
        return _tiles(first, p.images) if l2 else _stripes(first, p.images), each

    def start(self, p: Problem, sampled: np.ndarray) -> SquareState:
        """Begin with the pattern, scaled to eps."""
        x = p.threat.clip(p.images + p.threat.eps * p.threat.unit(sampled))
        return SquareState(Found.clean(p), x, np.full(p.labels.shape, np.inf, x.dtype))

    def step(self, p: Problem, s: SquareState, i: jax.Array, sampled: jax.Array) -> SquareState:
        """One query: of where it starts, then of a proposal."""
        h, w, c = p.images.shape[1:]
        sides = self.sides((h, w, c), p.threat.norm)
        side = jnp.asarray(sides, jnp.int32)[i]
        room = (jnp.asarray([h, w], jnp.int32) - side + (0 if self.faithful else 1)).astype(jnp.float32)

        def window(first: int) -> tuple[jax.Array, jax.Array]:
            corner = jnp.floor(sampled[:, first : first + 2] * room).astype(jnp.int32)
            return corner, _window(corner, side, p.images)

        signs = _signs(sampled[:, :c]).astype(p.images.dtype)[:, None, None, :]
        corner, changed = window(c)
        if p.threat.norm == "linf":
            x = p.threat.project(s.best + jnp.where(changed, 2 * p.threat.eps * signs, 0), p.images)
        else:
            _, emptied = window(c + 2)
            kinds = sorted(set(sides))
            kind = jnp.asarray([kinds.index(side) for side in sides], jnp.int32)[i]
            patterns = jnp.asarray(np.stack([_canvas(side, p.images.shape[1:3]) for side in kinds]), s.best.dtype)
            pattern = _placed(patterns[kind], corner, sampled[:, -1] < 0.5)[..., None] * signs
            delta = _exchanged(s.best - p.images, changed, emptied, pattern, p.threat.eps)
            x = p.threat.clip(p.images + p.threat.eps * p.threat.unit(delta))
        x = jnp.where(i == 0, s.best, x)
        logits = p.logits_fn(x)
        now = margin(logits, p.labels)
        better = (now < s.margin) | (now <= 0)
        return SquareState(
            s.found.seen(p, x, logits),
            jnp.where(per_example(better, x), x, s.best),
            jnp.where(better, now, s.margin),
        )


def _window(corner: Array, side: Array, images: Array) -> jax.Array:
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


def _signs(u: Array) -> Array:
    """-1 or 1, evenly, of uniform samples from [0, 1)."""
    xp = u.__array_namespace__()
    return xp.where(u < 0.5, xp.int8(-1), xp.int8(1))


def _stripes(u: np.ndarray, images: np.ndarray) -> np.ndarray:
    """Vertical stripes with a sign in every column and channel: [N, H, W, C] of u [N, W, ...]."""
    return np.broadcast_to(_signs(u[..., : images.shape[-1]])[:, None].astype(images.dtype), images.shape)


def _tiling(h: int, w: int) -> tuple[int, int]:
    """Rows and columns of tiles, five or so."""
    side = max(h // 5, 1)
    return max(h // side, 1), max(w // side, 1)


def _tiles(u: np.ndarray, images: np.ndarray) -> np.ndarray:
    """Tiles of patterns, each with signs of its own and its own way to lie: [N, H, W, C] of u [N, tiles, ...]."""
    h, w = images.shape[1:3]
    down, across = _tiling(h, w)
    side = max(h // 5, 1)
    rows, columns = (np.arange(n) - (h - 5 * side) // 2 for n in (h, w))
    inside = ((rows >= 0) & (rows // side < down))[:, None] & ((columns >= 0) & (columns // side < across))[None]
    tile = np.where(inside, (rows // side)[:, None] * across + (columns // side)[None], 0)
    upright, lying = (
        (kind[rows[:, None] % side, columns[None] % side] * inside).astype(images.dtype)
        for kind in (pattern(side), pattern(side).T)
    )
    signs = _signs(u[..., : images.shape[-1]]).astype(images.dtype)
    whole = np.where(u[..., -1][:, tile] < 0.5, upright, lying)[..., None] * signs[:, tile]
    return np.ascontiguousarray(whole)  # in the same order in memory however many there are, and so are its sums


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
