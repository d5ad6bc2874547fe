"""What a configuration will cost, before any machine is rented: `python -m rst_jax plan --topology=v5e:4x4`.

The real step is compiled ahead of time for the TPU topology, on a machine without one (needs libtpu:
pip install "jax[tpu]"). The compiled program tells memory and collectives. Operations and memory traffic are by formula
and the roofline is from the published rates of the chip, for TPUs and GPUs alike: no figure here was measured.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from rst_jax.config import Config
from rst_jax.data.catalog import CATALOG
from rst_jax.data.feed import batch_sizes
from rst_jax.data.sources import load_dataset
from rst_jax.initializers import init_variables
from rst_jax.models import ModelSpec
from rst_jax.planning.chips import parse_topology
from rst_jax.planning.compiled import Compiled, compile_step, topology_devices
from rst_jax.runtime.mesh import make_mesh
from rst_jax.runtime.operations import operations, outputs, step_operations

_PASSES = 13  # over a layer's output in one gradient: write, statistics twice, normalise, relu and their gradients
_MASK_PASSES = 8 + 3  # over the scores: the threshold four bits a pass, ties, the mask


@dataclasses.dataclass(frozen=True)
class Point:
    """Predicted times on so many chips, in seconds a step."""

    chips: int
    compute: float
    memory: float
    fixed: float
    reduce: float

    @property
    def step(self) -> float:
        """Masks and update, then what takes longer of arithmetic and memory, then the all-reduce; nothing overlaps."""
        return self.fixed + max(self.compute, self.memory) + self.reduce


@dataclasses.dataclass(frozen=True)
class Plan:
    """The whole prediction for a configuration on a topology."""

    topology: str
    chips: int
    batch_size: int
    steps_per_epoch: int
    epochs: int
    networks: int
    scores: int
    statistics: int
    operations: int
    traffic: float
    compiled: Compiled | None
    why_not: str
    points: list[Point]

    def hours(self, point: Point) -> float:
        """Chip-hours of all networks of the configuration."""
        return point.step * self.steps_per_epoch * self.epochs * self.networks * point.chips / 3600


def make_plan(config: Config, topology: str) -> Plan:
    """Compile (for a TPU, where libtpu is installed) and predict.

    Args:
      config: the run's.
      topology: "v5e:4x4", "h200:8": a name of `CHIPS`, and chips along each axis.

    Raises:
      ValueError: an unknown chip, a topology that does not parse or exist, a batch that its chips cannot share.
    """
    chip, chips = parse_topology(topology)
    n, image_shape, classes = _data(config)
    batches = batch_sizes(n, config.batch_size, chips)
    model = ModelSpec(config.model, classes, (0.5,) * image_shape[-1], (0.25,) * image_shape[-1]).make()
    variables = jax.eval_shape(
        lambda key: init_variables(model, image_shape, key, pattern=config.pattern), jax.random.key(0)
    )
    shown = {k: variables[k] for k in ("params", "batch_stats")}
    image = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)

    def forward(v: PyTree, x: jax.Array) -> PyTree:
        return model.apply(v, x, train=False)

    scores, statistics = (
        sum(math.prod(x.shape) for x in jax.tree.leaves(variables[k])) for k in ("scores", "batch_stats")
    )
    weights = sum(math.prod(x.shape) for x in jax.tree.leaves(variables["params"]))
    step_ops = step_operations(operations(forward, shown, image), config.attack.steps)
    activations = outputs(forward, shown, image)
    compiled, why_not = None, "no: only for TPUs can that be done on another machine"
    if topology[0] == "v":
        try:
            mesh = make_mesh(topology_devices(topology))
            compiled = compile_step(config, mesh, variables, image_shape, classes, n)
        except ImportError:
            why_not = 'no: libtpu is missing (pip install "jax[tpu]")'
    # Bytes that do not depend on the batch: scores for masks and update, weights in each pass.
    fixed = 4 * scores * (_MASK_PASSES + 6) + 2 * weights * (2 * config.attack.steps + 3)
    an_image = 2.0 * activations * _PASSES * (config.attack.steps + 1)
    points = []
    for count in sorted({2**i for i in range(9)} | {chips}):
        if config.batch_size % count:
            continue
        rows = config.batch_size // count
        reduced = chip.all_reduce(4 * (scores + statistics), count)
        points.append(
            Point(
                count, step_ops * rows / chip.flops, an_image * rows / chip.bandwidth, fixed / chip.bandwidth, reduced
            )
        )
    networks = len(config.remaining_ratios) + config.dense.train
    return Plan(
        topology, chips, config.batch_size, len(batches), config.epochs, networks, scores, statistics, step_ops,
        an_image, compiled, why_not, points,
    )  # fmt: skip


def _data(config: Config) -> tuple[int, tuple[int, ...], int]:
    """Images to train on, their shape, and the classes; what the catalogue lacks is loaded and counted."""
    n: int
    shape: tuple[int, ...]
    if facts := CATALOG.get(config.dataset):
        n, shape, classes = facts.train - config.holdout, facts.shape, facts.classes
    else:
        dataset = load_dataset(config)
        n, shape, classes = len(dataset.train), dataset.train.images.shape[1:], dataset.num_classes
    return min(n, config.train_examples or n), shape, classes


def plan_text(plan: Plan) -> str:
    """The plan for a terminal."""
    c = plan.compiled
    lines = [
        f"{plan.topology}: {plan.chips} chips, {plan.batch_size} images a step; predicted, not measured",
        "",
    ]

    def row(name: str, text: str) -> None:
        lines.append(f"  {name:14} {text}")

    chip, _ = parse_topology(plan.topology)
    row("operations", f"{plan.operations / 1e9:.1f} GFLOP an image and step; {chip.flops / 1e12:.0f} TFLOP/s a chip")
    row("traffic", f"{plan.traffic / 1e9:.2f} GB an image and step; {chip.bandwidth / 1e9:.0f} GB/s a chip")
    if c:
        fits = "fits" if c.memory <= chip.memory else "DOES NOT FIT"
        row("compiled", f"the real step, in {c.seconds:.0f} s; XLA counts {c.operations / 1e12:.2f} TFLOP and ")
        lines[-1] += f"{c.traffic / 1e9:.1f} GB a chip, loops once"
        row("memory", f"{c.memory / 1e9:.2f} GB of {chip.memory / 1e9:.0f} GB a chip: {fits}")
        for each in c.collectives:
            place = "INSIDE A LOOP" if each.in_loop else "once a step, outside the attack"
            row(each.kind, f"{each.bytes / 1e6:.1f} MB, {place}")
        row("", f"scores and statistics are {4 * (plan.scores + plan.statistics) / 1e6:.1f} MB")
    else:
        row("compiled", plan.why_not)
    lines += [
        "",
        "  chips  images/chip  compute  memory  masks, update  all-reduce   step      epoch  efficiency  all, h",
    ]
    one = plan.points[0].step
    for p in plan.points:
        ms = [1e3 * t for t in (p.compute, p.memory, p.fixed, p.reduce, p.step)]
        epoch = p.step * plan.steps_per_epoch
        lines.append(
            f"  {p.chips:5}  {plan.batch_size // p.chips:11}  {ms[0]:7.2f}  {ms[1]:6.2f}  {ms[2]:13.2f}  {ms[3]:10.2f}"
            f"  {ms[4]:6.2f} ms  {epoch:6.1f} s  {100 * one / p.step / p.chips:8.0f} %  {plan.hours(p):6.1f}"
        )
    whole = f"{plan.networks} networks of {plan.epochs} epochs of {plan.steps_per_epoch} steps"
    lines += [
        "",
        f"  all, h: chip-hours of {whole}; evaluation not counted. Times are a step's; nothing overlaps.",
        "  A chip that cannot hold its images takes them in parts (accumulate) at the same operations.",
    ]
    enough = batch_for(plan, 0.9)
    lines.append(f"  90 % of one chip's efficiency on 256 chips needs a batch of {enough:,} images.")
    return "\n".join(lines)


def batch_for(plan: Plan, efficiency: float, chips: int = 256) -> int:
    """The smallest batch, a multiple of the chips, at which so many reach this share of one chip's speed a chip."""
    one = plan.points[0]
    chip, _ = parse_topology(plan.topology)
    an_image = max(one.compute, one.memory) / plan.batch_size
    reduced = chip.all_reduce(4 * (plan.scores + plan.statistics), chips)
    rows = 1
    while True:
        busy = an_image * rows
        alone = an_image * rows * chips + one.fixed
        if alone / chips / (busy + one.fixed + reduced) >= efficiency:
            return rows * chips
        rows += 1


def to_dict(plan: Plan) -> dict[str, Any]:
    """The plan for JSON."""
    return dataclasses.asdict(plan) | {"step_seconds": [p.step for p in plan.points]}
