"""What is evaluated, a function or a ticket, as the driver takes it; and whether the question is right."""

import dataclasses
import hashlib
import re
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from rst_jax.evaluation.cascade import Classifier
from rst_jax.evaluation.programs import KEYS
from rst_jax.threat import ThreatModel
from rst_jax.tickets.ticket import Ticket

Tree = Any


@dataclasses.dataclass(frozen=True)
class Subject:
    """What is evaluated.

    Attributes:
      classifier: as the driver takes it.
      raw: called as it is: float32 images [N, H, W, C] to float32 logits [N, classes], both NumPy's.
      traced: JAX can trace it.
      obstacle: why JAX cannot differentiate it; "" where it can.
    """

    classifier: Classifier
    raw: Callable[[np.ndarray], np.ndarray]
    traced: bool = True
    obstacle: str = ""

    def program(self, images: np.ndarray) -> str:
        """A digest of what is computed, its gradient included; of weights it sees only shapes."""
        apply, variables = self.classifier.apply, self.classifier.variables

        def total(x: jax.Array, variables: Tree) -> jax.Array:
            return jnp.sum(apply(variables, x))

        asked = total if self.obstacle else jax.value_and_grad(total)
        text = str(jax.make_jaxpr(asked)(jax.ShapeDtypeStruct((2, *images.shape[1:]), jnp.float32), variables))
        return hashlib.sha256(re.sub("0x[0-9a-f]+", "", text).encode()).hexdigest()  # without addresses in memory


def of_ticket(ticket: Ticket) -> Subject:
    """A ticket; tickets of one network share programs."""
    return Subject(Classifier(_apply(ticket.module), ticket.variables), _raw(ticket))


@lru_cache(maxsize=32)
def _apply(module: nn.Module) -> Callable[[Tree, jax.Array], jax.Array]:
    return partial(module.apply, train=False)  # type: ignore[return-value]


def _raw(logits_fn: Callable[..., Any]) -> Callable[[np.ndarray], np.ndarray]:
    def raw(x: np.ndarray) -> np.ndarray:
        with jax.default_matmul_precision("highest"):
            return np.asarray(logits_fn(x)).astype(np.float32)

    return raw


def of_function(logits_fn: Callable[..., Any], images: np.ndarray) -> Subject:
    """A function or a ticket; `images` [n, H, W, C] are of the kind it takes.

    Raises:
      ValueError: what it gives are no logits.
    """
    some = images[:2]
    with jax.default_matmul_precision("highest"):
        first = np.asarray(logits_fn(some))
    if first.ndim != 2 or len(first) != len(some) or first.shape[1] < 2:
        raise ValueError(
            f"logits_fn must give logits [N, classes], at least two; for images {list(some.shape)} it gave "
            f"{list(first.shape)}."
        )
    if not jnp.issubdtype(first.dtype, jnp.floating):
        raise ValueError(f"logits_fn must give floats; got {first.dtype}.")
    if isinstance(logits_fn, Ticket):
        return of_ticket(logits_fn)
    like, classes = jax.ShapeDtypeStruct(some.shape, jnp.float32), first.shape[1]

    def inside(_: Tree, x: jax.Array) -> jax.Array:
        return jnp.asarray(logits_fn(x), jnp.float32)

    def outside(_: Tree, x: jax.Array) -> jax.Array:
        def called(x: Any) -> np.ndarray:
            return np.asarray(logits_fn(np.asarray(x)), np.float32)

        return jax.pure_callback(called, jax.ShapeDtypeStruct((x.shape[0], classes), jnp.float32), x)

    def obstacle(function: Callable[..., Any]) -> str:
        try:
            jax.eval_shape(function, like)
        except Exception as error:  # whatever another library says of a tracer
            return f"{type(error).__name__}: {error}".split("\n")[0][:200]
        return ""

    untraced = obstacle(partial(inside, ()))
    undifferentiated = untraced or obstacle(jax.grad(lambda x: jnp.sum(inside((), x))))
    return Subject(Classifier(outside if untraced else inside), _raw(logits_fn), not untraced, undifferentiated)


def check_question(images: np.ndarray, labels: np.ndarray, ids: np.ndarray, threat: ThreatModel) -> None:
    """Refuse images, labels, ids or a radius that are not right, in a sentence.

    Raises:
      ValueError: says what was expected, and what it was.
    """
    n, box = len(images), f"[{threat.lower:g}, {threat.upper:g}]"
    if images.ndim != 4 or not n:
        raise ValueError(f"images must be [n, H, W, C], at least one; got {list(images.shape)}.")
    if images.dtype != np.float32:
        hint = " Divide integers by 255." if np.issubdtype(images.dtype, np.integer) else ""
        raise ValueError(f"images must be float32 in {box}; got {images.dtype}.{hint}")
    low, high = images.min(), images.max()
    if not (low >= np.float32(threat.lower) and high <= np.float32(threat.upper)):
        raise ValueError(f"images must lie in {box}; got values from {low:.4g} to {high:.4g}.")
    for name, values in (("labels", labels), ("ids", ids)):
        if values.shape != (n,) or not np.issubdtype(values.dtype, np.integer):
            raise ValueError(f"{name} must be integers [{n}], one an image; got {values.dtype} {list(values.shape)}.")
    if len(np.unique(ids)) < n or not (ids.min() >= -(2**31) and ids.max() < 2**31):
        raise ValueError("ids must be different integers of 32 bits, since random draws follow from them.")
    reach = (threat.upper - threat.lower) * (1 if threat.norm == "linf" else images[0].size ** 0.5)
    if not float(threat.eps) <= reach:
        raise ValueError(
            f"eps must be at most {reach:.4g}, where every image of {box} can be reached; got {float(threat.eps):g}. "
            "It is in the units of the images: eight of 255 levels are 8 / 255 where images lie in [0, 1]."
        )


def key_data(key: jax.Array | None) -> np.ndarray:
    """The two words of a random key; of key 0 if there is none.

    Raises:
      ValueError: it is no key of two words (threefry2x32, what `jax.random.key` makes unless told otherwise).
    """
    key = jax.random.key(0, impl=KEYS) if key is None else key
    if isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        key = jax.random.key_data(key)
    data = np.asarray(key)
    if data.shape != (2,) or data.dtype != np.uint32:
        raise ValueError(f"key must be one of jax.random.key's, two words of 32 bits; got {data.dtype} {data.shape}.")
    return data
