"""What the compilers say of the steps and of the evaluation's programs, for cards that this machine does not have.

    pip install ".[plan]"
    python benchmarks/compiled.py                     # everything: an hour on two cores, mostly the TPU compiler's
    python benchmarks/compiled.py h100:1 cifar10_r18  # of one chip and network, a minute
    python benchmarks/compiled.py here                # on the accelerator of this machine, and timed

Compiles the search step and the step of dense training, then a step of APGD, FAB, Square and PGD-20, and prints
kernels, bytes, seconds at published rates and by the compiler's own estimate; of the search the ten kernels that take
longest; of the attacks, what they move beside the passes of the network. The figures are the same each time. They go to
results/compiled.json, where those of other chips and networks stay. On an accelerator each program also runs, on zeros,
and its measured time stands beside the predicted one; these go to results/predicted.json.
"""

import argparse
import dataclasses
import json
import statistics
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from rst_jax.attacks import APGD, FAB, PGD, Attack, Problem, Square
from rst_jax.cli.config_file import load
from rst_jax.config import Config, PGDSettings
from rst_jax.evaluation.programs import Programs
from rst_jax.initializers import init_variables
from rst_jax.models import ModelSpec
from rst_jax.planning.chips import Topology, chip_name, parse_topology
from rst_jax.planning.compiled import Compiled, compile_program, compile_step, placed, topology_devices
from rst_jax.planning.counts import Counts, by_kind, count, kernels_text
from rst_jax.planning.hlo import Kernel
from rst_jax.planning.plan import data_of, parts_of
from rst_jax.records import provenance
from rst_jax.runtime.files import write_json
from rst_jax.runtime.mesh import AXIS, make_mesh
from rst_jax.runtime.work import find_devices
from rst_jax.threat import ThreatModel
from rst_jax.training.target import Weights

# Images of a chip, by config file and kind of chip.
IMAGES = {
    "cifar10_r18": {"h100": 256, "h200": 256, "a100": 256, "v5e": 64},
    "cifar10_wrn34": {"h100": 128, "h200": 128, "a100": 128, "v5e": 64},
    "imagenet_r50": {"h100": 128, "h200": 128, "a100": 128, "v5e": 128},
}
ATTACKS: tuple[Attack, ...] = (
    APGD("ce"),
    FAB(),
    Square(),
    PGD("PGD-20", PGDSettings(20, 2 / 255)),
)


@dataclasses.dataclass(frozen=True)
class Subject:
    """A configuration on one chip, and the shapes of its network."""

    config: Config
    topology: Topology
    mesh: Mesh
    spec: ModelSpec
    shape: tuple[int, ...]
    variables: Any

    @classmethod
    def of(cls, name: str, there: Topology, devices: list[jax.Device]) -> "Subject":
        """Of a config file, with so many images as `IMAGES` says."""
        file = Path(__file__).parent.parent / "configs" / f"{name}.py"
        rows = IMAGES.get(name, {}).get(there.name, 64) * there.chips
        config = load(str(file), {"batch_size": rows}).config()
        _, shape, classes = data_of(config)
        half = (0.5,) * shape[-1]
        spec = ModelSpec(config.model, classes, half, half)
        model = spec.make()
        variables = jax.eval_shape(lambda key: init_variables(model, shape, key), jax.random.key(0))
        return cls(config, there, make_mesh(devices), spec, shape, variables)

    def programs(self) -> Iterator[tuple[str, Compiled]]:
        """All of them, by name."""
        yield "step of a search", self.step(False)
        yield "step of dense training", self.step(True)
        for attack in ATTACKS:
            yield f"step of {attack.name}", self.attack(attack)

    def step(self, dense: bool) -> Compiled:
        """The step of a search, or of training a dense network."""
        n, target = data_of(self.config)[0], Weights("params") if dense else None
        return compile_step(self.config, self.mesh, self.variables, self.shape, self.spec.num_classes, n, target)

    def attack(self, attack: Attack) -> Compiled:
        """The program of an evaluation's attack, in float32; its loop goes round as told, which counts as once."""
        rows, threat, model = self.config.batch_size, ThreatModel(8 / 255), self.spec.make()
        some = 2  # rows, from which the shapes of all follow
        zeros = np.zeros((some, *self.shape), np.float32)
        logits = np.zeros((some, self.spec.num_classes), np.float32)
        there = (zeros, logits, *(np.zeros(some, np.int32) for _ in range(2)), np.zeros((some, 2), np.uint32))
        first, each = attack.sample(Problem(lambda x: x, threat, *there))
        state = attack.start(Problem(lambda x: x, threat, *there), first)

        def split(tree: Any) -> Any:
            shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct((rows, *np.shape(x)[1:]), x.dtype), tree)
            return placed(shapes, self.mesh, PartitionSpec(AXIS))

        def everywhere(tree: Any) -> Any:
            return placed(tree, self.mesh, PartitionSpec())

        variables = {k: self.variables[k] for k in ("params", "batch_stats")}
        fixed = (everywhere(variables), everywhere(jax.ShapeDtypeStruct((), jnp.float32)), *split(there))
        with jax.default_matmul_precision("highest"):
            apply: Any = partial(model.apply, train=False)
            go_on: Any = Programs(self.mesh, rows).attack(attack, threat, apply, fixed)
            number = everywhere(jax.ShapeDtypeStruct((), jnp.int32))
            return compile_program(go_on, *fixed, split(each), split(state), number, number)


def of_network(kernel: Kernel, name: str) -> bool:
    """Whether a kernel is one of the passes of the network, forward or back."""
    return kernel.operations > 0 or name in kernel.source


def measure(subject: Subject, name: str, timed: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    """All programs of a configuration on one chip, by name; printed as they come."""
    there, chip, network = subject.topology, subject.topology.chip, type(subject.spec.make()).__name__
    print(f"\n{name} on {there.text}, {subject.config.batch_size} images", flush=True)
    for title, made in subject.programs():
        kernels = made.program.kernels
        whole = count(kernels, chip)
        told: dict[str, Any] = {"step": dataclasses.asdict(whole), "memory": made.memory}
        show(title, whole, made)
        if title.endswith("search"):
            print(kernels_text(kernels, chip, 10), flush=True)
        if "training" in title or "search" in title:
            told |= {k: dataclasses.asdict(c) for k, c in parts_of(kernels, there, subject.config.attack.steps).items()}
            told["kinds"] = {kind: dataclasses.asdict(counts) for kind, counts in by_kind(kernels, chip).items()}
        else:
            beside = count([k for k in kernels if not of_network(k, network)], chip)
            told["beside the network"] = dataclasses.asdict(beside)
            shares = 100 * beside.bytes / whole.bytes, 100 * beside.best / whole.best
            print(
                "    beside the network's passes {:.1f} % of the bytes, {:.1f} % of the time".format(*shares),
                flush=True,
            )
        if timed:
            told["measured"] = took = seconds_here(made)
            print(f"    measured {1e3 * took:.2f} ms, predicted {whole.best / took:.2f} of it", flush=True)
        yield title, told


def seconds_here(made: Compiled, calls: int = 20) -> float:
    """Of a call on this machine, on zeros; the median of five turns."""
    (told, _), (shardings, _) = made.executable.args_info, made.executable.input_shardings
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), told)
    arguments = list(jax.device_put(zeros, shardings))
    arguments[-1] = jax.device_put(jnp.ones((), jnp.int32), shardings[-1])  # an attack goes up to there
    leaves = [jax.tree.leaves(part) for part in told]
    donated = next(i for i, part in enumerate(leaves) if part and all(leaf.donated for leaf in part))
    turns = []
    for _ in range(6):
        start = time.perf_counter()
        for _ in range(calls):
            arguments[donated] = made.executable(*arguments)[0]
        jax.block_until_ready(arguments[donated])
        turns.append((time.perf_counter() - start) / calls)
    return statistics.median(turns[1:])


def show(title: str, counts: Counts, made: Compiled) -> None:
    """A line of the table."""
    own = f", {1e3 * counts.estimate:.2f} ms by the compiler" if counts.estimate else ""
    moved, done = f"{counts.bytes / 1e9:7.2f} GB", f"{counts.operations / 1e12:6.2f} TFLOP"
    print(
        f"  {title:24} {counts.kernels:6} kernels, {moved}, {done}, {1e3 * counts.seconds:7.2f} ms{own}; "
        f"{made.memory / 1e9:.2f} GB in use, compiled in {made.seconds:.0f} s",
        flush=True,
    )


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("topology", nargs="?", help="only this one, or here: the accelerator of this machine")
    parser.add_argument("config", nargs="?", help="only this one")
    parser.add_argument("--out", type=Path, help="instead of the file in results/")
    parser.add_argument("--rates", help="here: of which chip, where the device is none that is known")
    o = parser.parse_args()
    here = o.topology == "here"
    out = o.out or Path(__file__).parent / "results" / f"{'predicted' if here else 'compiled'}.json"
    if not here:
        jax.config.update("jax_platforms", "cpu")
    find_devices()
    found = json.loads(out.read_text()) if out.exists() else {}
    device = jax.devices()[0]
    chip = o.rates or chip_name(device.device_kind)
    if here and not chip:
        raise SystemExit(f"{device.device_kind} is no chip whose rates are known; name one by --rates=h100.")
    for topology in [f"{chip}:1"] if here else [o.topology] if o.topology else ("h100:1", "v5e:1x1"):
        there = parse_topology(topology)
        devices = [device] if here else topology_devices(there)
        for name in [o.config] if o.config else IMAGES:
            those = found.setdefault(f"{name}, {topology}", {})
            for title, told in measure(Subject.of(name, there, devices), name, here):
                those[title] = told
                write_json(out, {**found, "provenance": dataclasses.asdict(provenance())})


if __name__ == "__main__":
    main()
