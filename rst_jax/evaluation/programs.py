"""The compiled programs of attacks: the same for all rows, radii, restarts and networks of one shape."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from rst_jax.attacks.attack import Attack, Problem, advance
from rst_jax.runtime.mesh import AXIS, on_cpu
from rst_jax.runtime.operations import has_convolution, operations
from rst_jax.threat import ThreatModel

Tree = Any
Apply = Callable[[Tree, jax.Array], jax.Array]
_SPECS = {"r": PartitionSpec(AXIS), "v": PartitionSpec()}
KEYS = "threefry2x32"  # whatever JAX is told to take by default
# XLA's library for CPUs adds up the rows of larger arrays in another order than those of smaller ones; so it is left
# the products and convolutions, and a row's sum does not hang on how many rows there are.
_LIBRARY = ",".join(f"LIBRARY_FUSION_TYPE_INDIVIDUAL_{kind}" for kind in ("DOT", "CONVOLUTION"))
_ROW_BY_ROW = {"xla_cpu_experimental_ynn_fusion_type": _LIBRARY}
_TOY = 3e4  # operations of a forward pass over an image, below which a call costs more than what it calls
Fixed = tuple[Any, ...]  # variables, eps, images, logits, labels, targets, key data


class Programs:
    """Makes programs when they are first needed, and keeps them.

    Args:
      mesh: all devices.

    Attributes:
      compiled: how many were made, for each attack.
      worth: operations that take about as long as to compile the program of an attack.
    """

    def __init__(self, mesh: Mesh):
        self.mesh, self._slow, self._operations = mesh, dict[Any, bool](), dict[Any, float]()
        self.worth = 1e11 if on_cpu(mesh) else 2e14
        self.compiled: dict[str, int] = {}
        self._kept: dict[Any, Any] = {}

    def logits(self, apply: Apply) -> Callable:
        """(variables, images [N, ...]) to logits [N, classes]."""
        return self._program(("logits", apply), apply, "vr", "r", "logits")

    def operations(self, apply: Apply, variables: Tree, images: Any) -> float:
        """What a forward pass over one of `images` needs, by formula; inf where that is not known."""
        name = apply, images.shape[1:]
        if name not in self._operations:
            try:
                counted = operations(apply, variables, jax.ShapeDtypeStruct((1, *images.shape[1:]), np.float32))
            except ValueError:  # a loop
                counted = 0
            self._operations[name] = counted or math.inf
        return self._operations[name]

    def one_by_one(self, attack: Attack, apply: Apply, fixed: Fixed) -> bool:
        """Whether steps are better called one by one: in loops, XLA's gradients of convolutions are slow on a CPU.

        It does not hang on how many rows there are, since neither may results.
        """
        if not (attack.needs_gradient and on_cpu(self.mesh)):
            return False
        variables, _, images, *_ = fixed
        name = apply, images.shape[1:]
        if name not in self._slow:
            toy = self.operations(apply, variables, images) < _TOY
            self._slow[name] = not toy and has_convolution(apply, variables, images)
        return self._slow[name]

    def attack(self, attack: Attack, threat: ThreatModel, apply: Apply, fixed: Fixed) -> Callable:
        """Of an attack: (fixed, drawn, state, i, last) to (state, i).

        It makes the step i, or all up to `last`, which it ends early when every example is broken; it gives up the
        state it was given.
        """
        box, program = (threat.norm, threat.lower, threat.upper), attack.program

        def problem(variables: Tree, eps: jax.Array, *rows: jax.Array) -> Problem:
            images, logits, labels, targets, keys = rows
            network, there = partial(apply, variables), ThreatModel(eps, *box)
            return Problem(network, there, images, logits, labels, targets, jax.random.wrap_key_data(keys, impl=KEYS))

        def step(*arguments: Any) -> Any:
            *fixed, drawn, state, i, _ = arguments
            return advance(program, problem(*fixed), state, i, drawn), i + 1

        def steps(*arguments: Any) -> Any:
            *fixed, state, i, last = arguments

            def go(carry: tuple) -> jax.Array:
                return (carry[1] < last) & ~(program.rests & carry[0].found.broken.all())

            state, _ = lax.while_loop(go, lambda carry: step(*fixed, *carry, last), (state, i))
            return state, last

        many = step if self.one_by_one(attack, apply, fixed) else steps
        name = (program, apply, many is step, *box)
        return self._program(name, many, "vvrrrrr" + "rrvv", "rv", attack.name, gives_up=8)

    def _program(
        self, name: Any, inner: Callable, kinds: str, results: str, counted_as: str, gives_up: int | None = None
    ) -> Callable:
        """A function over the mesh, kept under its name; compiled once for each batch size.

        `kinds` of its arguments and results: r(ows), or v(alues that all devices hold). A step `gives_up` the argument
        that is its state.
        """
        if name not in self._kept:
            specs, out = (tuple(_SPECS[k] for k in those) for those in (kinds, results))

            def counted(*arguments: Any) -> Any:  # runs once a compilation
                self.compiled[counted_as] = self.compiled.get(counted_as, 0) + 1
                return inner(*arguments)

            mapped = jax.shard_map(
                counted, mesh=self.mesh, in_specs=specs, out_specs=out if len(out) > 1 else out[0], check_vma=False
            )
            # On a CPU, LLVM's later passes cost more time than they bring; what runs once a batch needs none.
            level = 0 if gives_up is None else 1
            options = {"xla_backend_optimization_level": level, **_ROW_BY_ROW} if on_cpu(self.mesh) else {}
            self._kept[name] = jax.jit(mapped, donate_argnums=gives_up, compiler_options=options)
        return self._kept[name]
