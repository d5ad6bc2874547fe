"""What is attacked: a function of images, or a ticket."""

import dataclasses
import gc
import hashlib
import re
from collections.abc import Callable, Mapping
from functools import lru_cache, partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from rst_jax.data.given import MOST_CLASSES
from rst_jax.tickets.ticket import Ticket

Apply = Callable[[PyTree, jax.Array], jax.Array]
LogitsFn = Callable[[Any], Any]  # images [N, H, W, C] to logits [N, classes], NumPy's or JAX's
KEYS = "threefry2x32"  # whatever JAX is told to take by default
_BARE = "logits_fn must give logits [N, classes] alone, one array"
_STATE = (
    "logits_fn keeps arrays from call to call (a random key that it splits, statistics that it updates, images that it "
    "stores), so it is no function of the images; give one that is, for instance in evaluation mode, or with one key."
)


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
      classes: how many logits it gives, where that is known.
    """

    apply: Apply
    variables: PyTree = ()
    function: LogitsFn | None = None
    traced: bool = True
    obstacle: str = ""
    name: str = "logits_fn"
    digest: str = ""
    classes: int = MOST_CLASSES

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
    return Classifier(
        apply, ticket.variables, ticket, name=ticket.name, digest=ticket.digest, classes=ticket.model.num_classes
    )


@lru_cache(maxsize=32)
def of_module(module: nn.Module) -> Apply:
    """A Flax module as (variables, images) to logits, the same function for equal modules."""
    return partial(module.apply, train=False)  # type: ignore[return-value]


def of_function(logits_fn: LogitsFn, some: np.ndarray) -> Classifier:
    """A function or a ticket; `some` [n, H, W, C] are one or two images of the kind it takes.

    JAX traces it only if its calls leave no arrays behind, in whose place its owner would find tracers.

    Raises:
      ValueError: what it gives are no logits, or it keeps arrays from call to call.
    """
    if not callable(logits_fn) or (isinstance(logits_fn, nn.Module) and logits_fn.scope is None):
        raise ValueError(
            f"logits_fn must be a function of images, or a ticket; got {_named(logits_fn)}. Of a Flax module give "
            "lambda x: module.apply(variables, x)."
        )
    try:
        with jax.default_matmul_precision("highest"):
            first = _logits(logits_fn(some), some)
        keeps = not isinstance(logits_fn, Ticket) and _keeps_arrays(logits_fn, some)
    except jax.errors.UnexpectedTracerError as error:  # what its own compiled function has left behind
        raise ValueError(_STATE) from error
    if keeps:
        raise ValueError(_STATE)
    if isinstance(logits_fn, Ticket):
        return of_ticket(logits_fn)
    classes = first.shape[1]
    like = jax.ShapeDtypeStruct(some.shape, jnp.float32)

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
    return Classifier(outside if untraced else inside, (), logits_fn, not untraced, undifferentiated, classes=classes)


def _logits(given: Any, some: np.ndarray) -> np.ndarray:
    """What a function gave for some images, as an array of logits.

    Raises:
      ValueError: it is none; what it is, and what to do.
    """
    if isinstance(given, Mapping | tuple | list):
        items = list(given.items() if isinstance(given, Mapping) else enumerate(given))
        arrays = [place for place, each in items if getattr(each, "ndim", 0) == 2 and len(each) == len(some)]
        pick = "logits" if "logits" in arrays else arrays[0] if arrays else None
        hint = "np.asarray(logits_fn(x), np.float32)" if pick is None else f"logits_fn(x)[{pick!r}]"
        raise ValueError(f"{_BARE}; it gave {_named(given)}. Give lambda x: {hint} or the like.")
    try:
        found = np.asarray(given)
    except Exception as error:  # an array of another library, which says why
        told = " ".join(str(error).split())[:200]
        hint = "give NumPy's or JAX's, for instance logits.detach().cpu().float().numpy()"
        raise ValueError(f"{_BARE}; it gave {_named(given)}, which NumPy cannot read ({told}): {hint}.") from error
    if found.dtype.kind in "OSU":
        raise ValueError(f"{_BARE}; it gave {_named(given)}.")
    if found.ndim != 2 or len(found) != len(some) or found.shape[1] < 2:
        raise ValueError(
            f"logits_fn must give logits [N, classes], at least two; for images {list(some.shape)} it gave "
            f"{list(found.shape)}."
        )
    if not jnp.issubdtype(found.dtype, jnp.floating):
        raise ValueError(f"logits_fn must give floats; got {found.dtype}.")
    return found


def _named(given: Any) -> str:
    """What something is, for a sentence."""
    kind = f"{type(given).__module__.split('.')[0]}.{type(given).__name__}".removeprefix("builtins.")
    if isinstance(given, Mapping):
        return f"a {kind} with {', '.join(map(repr, given)) or 'nothing'}"[:200]
    if isinstance(given, tuple | list):
        return f"a {kind} of {', '.join(type(each).__name__ for each in given[:4]) or 'nothing'}"
    return "None" if given is None else f"an object of type {kind}"


def _keeps_arrays(logits_fn: LogitsFn, some: np.ndarray) -> bool:
    """Whether every call leaves JAX arrays behind that were not there before.

    Raises:
      UnexpectedTracerError: it has left what is traced behind, which shows at another size than before.
    """
    images = np.concatenate([some, some[:1]])

    def leaves() -> bool:
        before = jax.live_arrays()  # held, so that none of these makes room for another
        known = {id(array) for array in before}

        def new() -> bool:
            return any(id(array) not in known for array in jax.live_arrays())

        try:
            logits_fn(jnp.asarray(images))
        except jax.errors.UnexpectedTracerError:
            raise
        except Exception:  # it takes NumPy's alone
            return False
        return new() and gc.collect() >= 0 and new()

    return all(leaves() for _ in range(3))  # compiled programs and caches keep some at first
