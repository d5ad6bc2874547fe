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

from rst_jax.attacks.attack import Attack, Found, Problem, draws
from rst_jax.losses import margin
from rst_jax.threat import l2_norm, per_example

_HALVED_AFTER = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)  # queries


class SquareState(NamedTuple):
    """Of each example: the best image and its margin."""

    found: Found
    best: jax.Array
    margin: jax.Array


class Proposal(NamedTuple):
    """What the steps draw for each example.

    Attributes:
      corner: int16 [..., N, 2], first row and column of the square.
      signs: int8 [..., N, C], of each channel.
      other: of L2, as `corner`, of the window that is emptied.
      upright: of L2, bool [..., N], how the pattern lies.
    """

    corner: jax.Array
    signs: jax.Array
    other: jax.Array | None = None
    upright: jax.Array | None = None


@dataclasses.dataclass(frozen=True)
class Square(Attack):
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

    def draw(self, p: Problem) -> tuple[jax.Array, Proposal]:
        """A pattern of the whole image and all proposals, from each example's key."""
        h, w, c = p.images.shape[1:]
        sides = np.asarray(self.sides((h, w, c), p.threat.norm))[:, None]
        places = jnp.asarray(np.asarray([h, w]) - sides + (0 if self.faithful else 1), jnp.float32)
        l2 = p.threat.norm == "l2"
        count = math.prod(_tiling(h, w)) if l2 else w
        # Of a step: signs, two coordinates, and for L2 two more and a way to lie; one draw compiles fastest.
        u = draws(jax.random.uniform, p.keys, (count + self.passes, c + (5 if l2 else 2)), jnp.float32)
        first, each = u[:, :count], u[:, count:].swapaxes(0, 1)

        def corners(u: jax.Array) -> jax.Array:
            return jnp.floor(u * places[:, None]).astype(jnp.int16)

        proposals = Proposal(corners(each[..., c : c + 2]), _signs(each, c))
        if l2:
            proposals = proposals._replace(other=corners(each[..., c + 2 : c + 4]), upright=_lies(each))
        return _tiles(first, p.images) if l2 else _stripes(first, p.images), proposals

    def start(self, p: Problem, drawn: jax.Array) -> SquareState:
        """Begin with the pattern, scaled to eps."""
        x = p.threat.clip(p.images + p.threat.eps * p.threat.unit(drawn))
        return SquareState(Found.clean(p), x, jnp.full(p.labels.shape, jnp.inf, x.dtype))

    def step(self, p: Problem, s: SquareState, i: jax.Array, drawn: Proposal) -> SquareState:
        """One query: of where it starts, then of a proposal."""
        signs = drawn.signs.astype(p.images.dtype)[:, None, None, :]
        corner = drawn.corner.astype(jnp.int32)
        sides = self.sides(p.images.shape[1:], p.threat.norm)
        side = jnp.asarray(sides, jnp.int32)[i]
        window = _window(corner, side, p.images)
        if drawn.other is None or drawn.upright is None:
            x = p.threat.project(s.best + jnp.where(window, 2 * p.threat.eps * signs, 0), p.images)
        else:
            emptied = _window(drawn.other.astype(jnp.int32), side, p.images)
            kinds = sorted(set(sides))
            kind = jnp.asarray([kinds.index(side) for side in sides], jnp.int32)[i]
            patterns = jnp.asarray(np.stack([_canvas(side, p.images.shape[1:3]) for side in kinds]), s.best.dtype)
            pattern = _placed(patterns[kind], corner, drawn.upright)[..., None] * signs
            delta = _exchanged(s.best - p.images, window, emptied, pattern, p.threat.eps)
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


def _signs(u: jax.Array, channels: int) -> jax.Array:
    """int8 [..., C]."""
    return jnp.where(u[..., :channels] < 0.5, -1, 1).astype(jnp.int8)


def _lies(u: jax.Array) -> jax.Array:
    return u[..., -1] < 0.5


def _stripes(u: jax.Array, images: jax.Array) -> jax.Array:
    """Vertical stripes with a sign in every column and channel: [N, H, W, C] of u [N, W, ...]."""
    return jnp.broadcast_to(_signs(u, images.shape[-1])[:, None].astype(images.dtype), images.shape)


def _tiling(h: int, w: int) -> tuple[int, int]:
    """Rows and columns of tiles, five or so."""
    side = max(h // 5, 1)
    return max(h // side, 1), max(w // side, 1)


def _tiles(u: jax.Array, images: jax.Array) -> jax.Array:
    """Tiles of patterns, each with signs of its own and its own way to lie: [N, H, W, C] of u [N, tiles, ...]."""
    h, w = images.shape[1:3]
    down, across = _tiling(h, w)
    side = max(h // 5, 1)
    rows, columns = (np.arange(n) - (h - 5 * side) // 2 for n in (h, w))
    inside = ((rows >= 0) & (rows // side < down))[:, None] & ((columns >= 0) & (columns // side < across))[None]
    tile = np.where(inside, (rows // side)[:, None] * across + (columns // side)[None], 0)
    upright, lying = (
        jnp.asarray(kind[rows[:, None] % side, columns[None] % side] * inside, images.dtype)
        for kind in (pattern(side), pattern(side).T)
    )
    signs = _signs(u, images.shape[-1]).astype(images.dtype)
    return jnp.where(_lies(u)[:, tile], upright, lying)[..., None] * signs[:, tile]


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
