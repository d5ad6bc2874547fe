"""What is attacked: a function of images, or a ticket."""

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
from jaxtyping import PyTree

from rst_jax.tickets.ticket import Ticket

Apply = Callable[[PyTree, jax.Array], jax.Array]
LogitsFn = Callable[[Any], Any]  # images [N, H, W, C] to logits [N, classes], NumPy's or JAX's
KEYS = "threefry2x32"  # whatever JAX is told to take by default


@dataclasses.dataclass(frozen=True, eq=False)
class Classifier:
    """What is attacked: `apply(variables, images [N, H, W, C]) -> logits [N, classes]`.

    Attributes:
      apply: one function for all networks of one shape, so that they share programs.
      variables: its first argument.
      function: what was given, called as it is.
      traced: JAX can trace it.
      obstacle: why JAX cannot differentiate it; "" where it can.
      name: for the card.
      digest: of its weights; "" where they are not known.
    """

    apply: Apply
    variables: PyTree = ()
    function: LogitsFn | None = None
    traced: bool = True
    obstacle: str = ""
    name: str = "logits_fn"
    digest: str = ""

    def raw(self, images: np.ndarray) -> np.ndarray:
        """What the function itself says: float32 [N, classes] of float32 [N, H, W, C]."""
        function: LogitsFn = self.function or partial(self.apply, self.variables)
        with jax.default_matmul_precision("highest"):
            return np.asarray(function(images)).astype(np.float32)

    def program(self, image_shape: tuple[int, ...]) -> str:
        """A digest of what is computed, its gradient included; of weights it sees only shapes."""

        def total(x: jax.Array, variables: PyTree) -> jax.Array:
            return jnp.sum(self.apply(variables, x))

        asked = total if self.obstacle else jax.value_and_grad(total)
        text = str(jax.make_jaxpr(asked)(jax.ShapeDtypeStruct((2, *image_shape), jnp.float32), self.variables))
        return hashlib.sha256(re.sub("0x[0-9a-f]+", "", text).encode()).hexdigest()  # without addresses in memory


def of_ticket(ticket: Ticket) -> Classifier:
    """A ticket; tickets of one network share programs."""
    apply = of_module(ticket.model.make())
    return Classifier(apply, ticket.variables, ticket, name=ticket.name, digest=ticket.digest)


@lru_cache(maxsize=32)
def of_module(module: nn.Module) -> Apply:
    """A Flax module as (variables, images) to logits, the same function for equal modules."""
    return partial(module.apply, train=False)  # type: ignore[return-value]


def of_function(logits_fn: LogitsFn, some: np.ndarray) -> Classifier:
    """A function or a ticket; `some` [n, H, W, C] are one or two images of the kind it takes.

    Raises:
      ValueError: what it gives are no logits.
    """
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

    def inside(_: PyTree, x: jax.Array) -> jax.Array:
        return jnp.asarray(logits_fn(x), jnp.float32)

    def outside(_: PyTree, x: jax.Array) -> jax.Array:
        def called(x: jax.Array) -> np.ndarray:
            return np.asarray(logits_fn(np.asarray(x)), np.float32)

        return jax.pure_callback(called, jax.ShapeDtypeStruct((x.shape[0], classes), jnp.float32), x)

    def obstacle(function: LogitsFn) -> str:
        try:
            jax.eval_shape(function, like)
        except Exception as error:  # whatever another library says of a tracer
            return f"{type(error).__name__}: {error}".split("\n")[0][:200]
        return ""

    untraced = obstacle(partial(inside, ()))
    undifferentiated = untraced or obstacle(jax.grad(lambda x: jnp.sum(inside((), x))))
    return Classifier(outside if untraced else inside, (), logits_fn, not untraced, undifferentiated)
