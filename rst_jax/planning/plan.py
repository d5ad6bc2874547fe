"""What a configuration will cost, before any machine is rented: `python -m rst_jax plan --topology=v5e:4x4`.

The real step is compiled ahead of time for the topology, on a machine without one. The compiled text tells its kernels,
the bytes that they move, memory and collectives; times follow from the chip's published rates, and on a TPU from the
compiler's own estimates. Where the compiler is not installed there is the floor alone: operations and traffic by
formula. No figure here was measured.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from rst_jax.config import Config
from rst_jax.data.catalog import CATALOG
from rst_jax.data.feed import batch_sizes
from rst_jax.data.sources import load_dataset
from rst_jax.initializers import init_variables
from rst_jax.models import ModelSpec
from rst_jax.planning.chips import Topology, parse_topology
from rst_jax.planning.compiled import Compiled, compile_step, topology_devices
from rst_jax.planning.counts import Counts, by_kind, count, kind_of, scope_of
from rst_jax.planning.hlo import Kernel
from rst_jax.runtime.mesh import make_mesh
from rst_jax.runtime.operations import operations, outputs, step_operations

_PASSES = 13  # over a layer's output in one gradient: write, statistics twice, normalise, relu and their gradients
_MASK_PASSES = 8 + 3  # over the scores: the threshold four bits a pass, ties, the mask
_FIXED = ("masks", "update", "copy")  # kinds whose time does not grow with the batch


@dataclasses.dataclass(frozen=True)
class Floor:
    """By formula, an image or a step: what no program can do without at the published rates.

    Attributes:
      operations, traffic: of an image and step.
      fixed: bytes a step whatever the batch: scores for masks and update, weights in each pass.
    """

    operations: int
    traffic: float
    fixed: float


@dataclasses.dataclass(frozen=True)
class Point:
    """Predicted times on so many chips, in seconds a step.

    Attributes:
      images: what grows with a chip's images. fixed: what does not. reduce: the all-reduce.
    """

    chips: int
    images: float
    fixed: float
    reduce: float

    @property
    def step(self) -> float:
        """One after the other; nothing overlaps."""
        return self.images + self.fixed + self.reduce


@dataclasses.dataclass(frozen=True)
class Plan:
    """The whole prediction for a configuration on a topology.

    Attributes:
      parts: counts of the "step", its "attack_pass" and its "rest", and kinds: of each kind; {} where there is no
        compiler.
      compiled: the step; None where there is no compiler. why_not: then, why.
      points: by chips. an_image, fixed: the seconds that they follow from, of one image on one chip and of a step.
      floor_step: seconds by formula, on the topology's chips.
    """

    topology: Topology
    batch_size: int
    steps_per_epoch: int
    epochs: int
    networks: int
    scores: int
    statistics: int
    floor: Floor
    floor_step: float
    parts: Mapping[str, Counts]
    kinds: Mapping[str, Counts]
    compiled: Compiled | None
    why_not: str
    an_image: float
    fixed: float
    points: list[Point]

    def hours(self, point: Point) -> float:
        """Hours of all networks of the configuration."""
        return point.step * self.steps_per_epoch * self.epochs * self.networks / 3600


def make_plan(config: Config, topology: str) -> Plan:
    """Compile, where the compiler is installed, and predict.

    Args:
      config: the run's.
      topology: "v5e:4x4", "h200:8": a name of `CHIPS`, and chips along each axis.

    Raises:
      ValueError: an unknown chip, a topology that does not parse or exist, a batch that its chips cannot share.
    """
    there = parse_topology(topology)
    n, image_shape, classes = data_of(config)
    batches, rows = batch_sizes(n, config.batch_size, there.chips), config.batch_size // there.chips
    model = ModelSpec(config.model, classes, (0.5,) * image_shape[-1], (0.25,) * image_shape[-1]).make()
    variables = jax.eval_shape(
        lambda key: init_variables(model, image_shape, key, pattern=config.pattern), jax.random.key(0)
    )
    compiled, why_not = None, ""
    try:
        mesh = make_mesh(topology_devices(there))
        compiled = compile_step(config, mesh, variables, image_shape, classes, n)
    except ImportError as error:
        why_not = str(error)
    floor, chip = _floor(model, variables, image_shape, config.attack.steps), there.chip
    by_formula = chip.seconds(floor.traffic, floor.operations), floor.fixed / chip.bandwidth
    parts, kinds, (an_image, fixed) = {}, {}, by_formula
    if compiled:
        kernels = compiled.program.kernels
        parts, kinds = parts_of(kernels, there, config.attack.steps), by_kind(kernels, chip)
        fixed = sum(kinds[kind].best for kind in _FIXED if kind in kinds)
        alone = kinds["collective"].best if "collective" in kinds else 0.0
        an_image = (parts["step"].best - fixed - alone) / rows
    scores, statistics = (
        sum(math.prod(x.shape) for x in jax.tree.leaves(variables[k])) for k in ("scores", "batch_stats")
    )
    points = [
        Point(chips, an_image * config.batch_size / chips, fixed, chip.all_reduce(4 * (scores + statistics), chips))
        for chips in sorted({2**i for i in range(9)} | {there.chips})
        if config.batch_size % chips == 0
    ]
    return Plan(
        there,
        config.batch_size,
        len(batches),
        config.epochs,
        len(config.remaining_ratios) + config.dense.train,
        scores,
        statistics,
        floor,
        by_formula[0] * rows + by_formula[1] + chip.all_reduce(4 * (scores + statistics), there.chips),
        parts,
        kinds,
        compiled,
        why_not,
        an_image,
        fixed,
        points,
    )


def parts_of(kernels: list[Kernel], topology: Topology, attack_steps: int) -> dict[str, Counts]:
    """Counts of the step, of a pass of its attack, and of the rest."""
    attack = [k for k in kernels if scope_of(k) == "attack"]
    rest = [k for k in kernels if scope_of(k) != "attack"]
    chip = topology.chip
    return {
        "step": count(kernels, chip),
        "attack_pass": count(attack, chip, max(attack_steps, 1)),
        "rest": count(rest, chip),
    }


def _floor(model: nn.Module, variables: PyTree, image_shape: tuple[int, ...], attack_steps: int) -> Floor:
    shown = {k: variables[k] for k in ("params", "batch_stats")}
    image = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)

    def forward(v: PyTree, x: jax.Array) -> PyTree:
        return model.apply(v, x, train=False)

    scores, weights = (sum(math.prod(x.shape) for x in jax.tree.leaves(variables[k])) for k in ("scores", "params"))
    return Floor(
        step_operations(operations(forward, shown, image), attack_steps),
        2.0 * outputs(forward, shown, image) * _PASSES * (attack_steps + 1),
        4 * scores * (_MASK_PASSES + 6) + 2 * weights * (2 * attack_steps + 3),
    )


def data_of(config: Config) -> tuple[int, tuple[int, ...], int]:
    """Images to train on, their shape, and the classes; what the catalogue lacks is loaded and counted."""
    n: int
    shape: tuple[int, ...]
    if facts := CATALOG.get(config.dataset):
        n, shape, classes = facts.train - config.holdout, facts.shape, facts.classes
    else:
        dataset = load_dataset(config)
        n, shape, classes = len(dataset.train), dataset.train.images.shape[1:], dataset.num_classes
    return min(n, config.train_examples or n), shape, classes


def batch_for(plan: Plan, efficiency: float, chips: int = 256) -> int:
    """The smallest batch, a multiple of the chips, at which so many reach this share of one chip's speed a chip."""
    reduced = plan.topology.chip.all_reduce(4 * (plan.scores + plan.statistics), chips)
    rows = 1
    while True:
        busy = plan.an_image * rows
        alone = plan.an_image * rows * chips + plan.fixed
        if alone / chips / (busy + plan.fixed + reduced) >= efficiency:
            return rows * chips
        rows += 1


def to_dict(plan: Plan) -> dict[str, Any]:
    """The plan for JSON: `step`, `attack_pass` and `rest` have kernels, bytes, seconds and memory, of one chip."""
    told = {f.name: getattr(plan, f.name) for f in dataclasses.fields(plan) if f.name not in ("compiled", "parts")}
    found = dataclasses.asdict(plan.floor)
    told |= {"topology": plan.topology.text, "chips": plan.topology.chips, "floor": found}
    told |= {"kinds": {kind: dataclasses.asdict(c) for kind, c in plan.kinds.items()}}
    told |= {"points": [dataclasses.asdict(p) | {"step": p.step, "hours": plan.hours(p)} for p in plan.points]}
    if c := plan.compiled:
        told |= {name: dataclasses.asdict(part) | {"memory": c.memory} for name, part in plan.parts.items()}
        told |= {"compile_seconds": c.seconds, "collectives": [dataclasses.asdict(x) for x in c.program.collectives]}
        told["kernels"] = [dataclasses.asdict(k) | {"kind": kind_of(k)} for k in c.program.kernels]
    return told
