"""Batches, made inside jit from a dataset that lives on the device: order, gathering, augmentation.

Every random choice hangs on (key, epoch) or (key, step, example id), so a batch does not depend on how many
devices share it or where a run was resumed.
"""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Float, Int, Key


@flax.struct.dataclass
class Images:
    """A split on the device: pixels uint8 [N, H * W * C], labels int32 [N], ids int32 [N].

    An image is one row, which an accelerator gathers as it lies; images it would first lay out in another order.
    On its way there the leaves are NumPy's, and in abstract ones shapes.

    Attributes:
      shape: [H, W, C].
      levels: the pixel that means 1.0.
    """

    pixels: Any
    labels: Any
    ids: Any
    shape: tuple[int, ...] = flax.struct.field(pytree_node=False)
    levels: int = flax.struct.field(pytree_node=False)

    @classmethod
    def of(cls, images: Any, labels: Any, ids: Any, levels: int) -> "Images":
        """From images [N, H, W, C]."""
        return cls(images.reshape(len(images), -1), labels, ids, images.shape[1:], levels)

    def take(self, index: jax.Array, dtype: DTypeLike = jnp.float32) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Images in [0, 1], labels and ids at `index`."""
        images = self.pixels[index].reshape(-1, *self.shape).astype(dtype) / jnp.asarray(self.levels, dtype)
        return images, self.labels[index], self.ids[index]


def epoch_order(key: Key[jax.Array, ""], epoch: Int[jax.Array, ""] | int, n: int) -> Int[jax.Array, " {n}"]:
    """The order of the n training examples in an epoch: int32 [n]."""
    return jax.random.permutation(jax.random.fold_in(key, epoch), jnp.arange(n, dtype=jnp.int32))


def example_keys(key: Key[jax.Array, ""], ids: Int[jax.Array, " n"]) -> Key[jax.Array, " n"]:
    """A key for each example, from its id: [N]."""
    return jax.vmap(lambda i: jax.random.fold_in(key, i))(ids)


def augment(
    keys: Key[jax.Array, " n"], images: Float[jax.Array, "n h w c"], crop_padding: int, flip: bool
) -> Float[jax.Array, "n h w c"]:
    """Random crops of zero-padded images, mirrored with probability 1/2; one key an image."""
    if not crop_padding and not flip:
        return images
    p, (h, w, c) = crop_padding, images.shape[1:]
    padded = jnp.pad(images, ((0, 0), (p, p), (p, p), (0, 0)))

    def one(key: jax.Array, image: jax.Array) -> jax.Array:
        where, side = jax.random.split(key)
        top, left = jax.random.randint(where, (2,), 0, 2 * p + 1)
        image = lax.dynamic_slice(image, (top, left, jnp.zeros_like(top)), (h, w, c))
        return jnp.where(flip & jax.random.bernoulli(side), image[:, ::-1], image)

    return jax.vmap(one)(keys, padded)
