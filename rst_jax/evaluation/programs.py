"""Compiled programs over padded batches: the same for validation and cards, and for all networks of one shape.

An attack's program is kept for all cascades, restarts and, where its settings do not hang on it, radii. What it claims
is judged by another program, at another batch size, and its ball and box are checked in float64 on the host.
"""

import dataclasses
import math
from collections.abc import Callable, Hashable, Sequence
from functools import partial

import jax
import numpy as np
from jax import lax
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import PyTree

from rst_jax.attacks.attack import Attack, Problem, advance
from rst_jax.evaluation.classifier import KEYS, Apply, Classifier
from rst_jax.runtime.mesh import AXIS, fetch, make_mesh, on_cpu, replicate, split_rows
from rst_jax.runtime.operations import has_convolution, operations
from rst_jax.threat import ThreatModel

_SPECS = {"r": PartitionSpec(AXIS), "v": PartitionSpec()}
# XLA's library for CPUs adds up the rows of larger arrays in another order than those of smaller ones; so it is left
# the products and convolutions, and a row's sum does not hang on how many rows there are.
_LIBRARY = ",".join(f"LIBRARY_FUSION_TYPE_INDIVIDUAL_{kind}" for kind in ("DOT", "CONVOLUTION"))
_ROW_BY_ROW = {"xla_cpu_experimental_ynn_fusion_type": _LIBRARY}
_TOY = 3e4  # operations of a forward pass over an image, below which a call costs more than what it calls
Fixed = tuple[PyTree, ...]  # variables, eps, images, logits, labels, targets, key data


def sizes(batch_size: int, devices: int) -> list[int]:
    """Of batches, in ascending order: powers of two a device, and the batch size, rounded up to the devices.

    At least two a device: XLA computes one row by itself in another order. (Of the work of AutoAttack on 360 digits at
    batch size 250 on two devices, counted in passes, 8 % is padding, in 7 programs of attacks; sixteenths of the batch
    size, compiled only where that is cheaper than padding, came to 9 % in 6.)
    """
    most = max(-(-batch_size // devices), 2)
    return [devices * rows for rows in [*(2**k for k in range(1, most.bit_length()) if 2**k < most), most]]


class Programs:
    """Makes programs when they are first needed, and keeps them.

    Args:
      mesh: all devices.
      batch_size: examples a program takes at most.

    Attributes:
      compiled: how many were made, for each attack.
    """

    def __init__(self, mesh: Mesh, batch_size: int):
        self.mesh, self.batch_size = mesh, batch_size
        self.compiled: dict[str, int] = {}
        self._slow, self._kept = dict[Hashable, bool](), dict[Hashable, Callable]()

    def sizes(self, n: int) -> list[int]:
        """Of batches, where there are n examples."""
        return sizes(min(self.batch_size, n), self.mesh.size)

    def placed(self, classifier: Classifier) -> Classifier:
        """With its variables on all devices, so that no batch carries them there."""
        return dataclasses.replace(classifier, variables=replicate(classifier.variables, self.mesh))

    def logits(self, classifier: Classifier, images: np.ndarray, n: int, another: bool = False) -> np.ndarray:
        """Logits [k, classes] of images [k, H, W, C].

        Args:
          classifier: whose.
          images: in batches of the largest size.
          n: how many examples there are in all; sizes follow from it.
          another: by the program of another batch size than attacks run at.
        """
        there = self.sizes(n)
        size, step = there[-1], self.mesh.size
        if another:
            size = next(s for s in range(-(-2 * size // 3 // step) * step, 3 * size, step) if s and s not in there)
        predict, variables = self.predict(classifier.apply), replicate(classifier.variables, self.mesh)
        found = []
        with jax.default_matmul_precision("highest"):
            for first in range(0, len(images), size):
                rows = images[first : first + size]
                found.append(fetch(predict(variables, self.place(rows, size)))[: len(rows)])
        return np.concatenate(found)

    def place(self, rows: np.ndarray, size: int) -> jax.Array:
        """Rows on the devices, padded with the last one to `size`."""
        padding = np.repeat(rows[-1:], size - len(rows), axis=0)
        return split_rows(np.concatenate([rows, padding]), self.mesh)

    def predict(self, apply: Apply) -> Callable:
        """(variables, images [N, ...]) to logits [N, classes]."""
        return self.compile(("logits", apply), apply, "vr", "r", "logits", level=0)

    def attack(self, attack: Attack, threat: ThreatModel, apply: Apply, fixed: Fixed) -> Callable:
        """Of an attack: (fixed, sampled, state, i, last) to (state, i).

        It makes the step i, or all up to `last`, which it ends early when every example is broken; it gives up the
        state it was given.
        """
        box, program = (threat.norm, threat.lower, threat.upper), attack.program

        def problem(variables: PyTree, eps: jax.Array, *rows: jax.Array) -> Problem:
            images, logits, labels, targets, keys = rows
            network, there = partial(apply, variables), ThreatModel(eps, *box)
            return Problem(network, there, images, logits, labels, targets, jax.random.wrap_key_data(keys, impl=KEYS))

        def step(*arguments: PyTree) -> PyTree:
            *fixed, sampled, state, i, _ = arguments
            return advance(program, problem(*fixed), state, i, sampled), i + 1

        def steps(*arguments: PyTree) -> PyTree:
            *fixed, state, i, last = arguments

            def go(carry: tuple) -> jax.Array:
                return (carry[1] < last) & ~(program.rests & carry[0].found.broken.all())

            state, _ = lax.while_loop(go, lambda carry: step(*fixed, *carry, last), (state, i))
            return state, last

        many = step if self.one_by_one(attack, apply, fixed) else steps
        name = (program, apply, many is step, *box)
        return self.compile(name, many, "vvrrrrr" + "rrvv", "rv", attack.name, gives_up=8)

    def one_by_one(self, attack: Attack, apply: Apply, fixed: Fixed) -> bool:
        """Whether steps are better called one by one: in loops, XLA's gradients of convolutions are slow on a CPU.

        It does not hang on how many rows there are, since neither may results.
        """
        if not (attack.needs_gradient and on_cpu(self.mesh)):
            return False
        variables, _, images, *_ = fixed
        name = apply, images.shape[1:]
        if name not in self._slow:
            toy = self.toy(apply, variables, images.shape[1:])
            self._slow[name] = not toy and has_convolution(apply, variables, images)
        return self._slow[name]

    def toy(self, apply: Apply, variables: PyTree, image_shape: tuple[int, ...]) -> bool:
        """Whether calls and compilations cost more than what they call: of a network that takes hardly any time.

        AutoAttack on 1,000 digits with dense layers, 18,000 operations an image, takes 3.0 s in one size and with one
        look of the host a round, 3.9 s in two sizes with ten; 1.7 and 2.2 s where the programs are kept.
        """
        return _operations(apply, variables, image_shape) < _TOY

    def compile(
        self,
        name: Hashable,
        inner: Callable,
        kinds: Sequence[str],
        results: Sequence[str],
        counted_as: str,
        *,
        gives_up: int | None = None,
        level: int = 1,
    ) -> Callable:
        """A function over the mesh, kept under its name; compiled once for each batch size.

        Args:
          name: hashable; the same function has the same.
          inner: what every device computes.
          kinds, results: of its arguments and results: r(ows), or v(alues that all devices hold).
          counted_as: in `compiled`.
          gives_up: the argument whose memory the result takes.
          level: of LLVM's optimisation on a CPU, where the later passes cost more time than they bring; what runs once
            a batch needs none.
        """
        if name not in self._kept:
            specs, out = (tuple(_SPECS[k] for k in those) for those in (kinds, results))

            def counted(*arguments: PyTree) -> PyTree:  # runs once a compilation
                self.compiled[counted_as] = self.compiled.get(counted_as, 0) + 1
                return inner(*arguments)

            mapped = jax.shard_map(
                counted, mesh=self.mesh, in_specs=specs, out_specs=out if len(out) > 1 else out[0], check_vma=False
            )
            options = {"xla_backend_optimization_level": level, **_ROW_BY_ROW} if on_cpu(self.mesh) else {}
            self._kept[name] = jax.jit(mapped, donate_argnums=gives_up, compiler_options=options)
        return self._kept[name]


def make_programs(classifier: Classifier, batch_size: int) -> Programs:
    """Over all devices, or over one where the function is another library's."""
    return Programs(make_mesh() if classifier.traced else make_mesh(jax.devices()[:1]), batch_size)


def violations(threat: ThreatModel, adversarial: np.ndarray, images: np.ndarray) -> np.ndarray:
    """Which adversarial images left ball or box, or are not finite, checked in float64: bool [n]."""
    return threat.violations(adversarial.astype(np.float64), images.astype(np.float64))


def _operations(apply: Apply, variables: PyTree, image_shape: tuple[int, ...]) -> float:
    """What a forward pass over an image needs, by formula; inf where that is not known."""
    try:
        counted = operations(apply, variables, jax.ShapeDtypeStruct((1, *image_shape), np.float32))
    except ValueError:  # a loop
        counted = 0
    return counted or math.inf
