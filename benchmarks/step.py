"""How long a PGD-7 search step takes, where its time goes, and how long PyTorch takes, in one run.

    python benchmarks/step.py --model resnet18 --batch 32 --ratio 0.1

Prints a table and writes every measured second, with the machine and the versions, to benchmarks/results/.

Whoever is compared takes turns, run after run, so that a machine that drifts does so for all alike; the figures are
medians, after two turns that are not counted. A run is one step on a CPU and ten in one dispatch elsewhere, as in the
loop. Leave the machine to it: beside other work on a CPU PyTorch's threads spin while they wait for one another, and a
step can take ten times as long. The table says what other programs used.

What is measured:
  rst_jax             `make_train_step` as the loop calls it: order, crop, flip and noise included.
  PyTorch, released   what the paper's released code does; benchmarks/torch_step.py, which needs torch.
  PyTorch, best       the same step as well as PyTorch does it; float32, and bfloat16 autocast.

Where the time of our step goes, from programs of its own pieces:
  attack              the step less the same step with no attack steps, turn by turn.
  score gradient      `make_update` on fixed masks without an attack: a forward pass, the gradient for the weights.
  mask, update        `subnet.masks`; the optimiser's update of the scores.
  data                order, crop, flip and noise; the order of 50,000 images is drawn once an epoch, and counts by its
                      share of a step.
The pieces are measured apart from one another, so their sum need not be the whole; the table says how near it is.
Off the CPU the short ones hold the time of their dispatch.

Operations are counted by formula (`rst_jax.runtime.operations`): what the step needs, not what a program does. The
machine's own rate is that of a large matrix product of the same type, the best of all turns, in JAX or PyTorch,
whichever is faster.
"""

import argparse
import dataclasses
import importlib.util
import math
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

from rst_jax import subnet
from rst_jax.config import PGDSettings
from rst_jax.data.pipeline import Images, augment, epoch_order, example_keys
from rst_jax.initializers import init_variables
from rst_jax.models import ModelSpec
from rst_jax.records import provenance
from rst_jax.runtime.files import write_json
from rst_jax.runtime.mesh import make_mesh, on_cpu, replicate
from rst_jax.runtime.operations import operations, step_operations
from rst_jax.threat import ThreatModel
from rst_jax.training.state import TicketState
from rst_jax.training.step import Settings, make_train_step, make_update
from rst_jax.training.target import Scores, Weights

Run = Callable[[], Any]
EPS, STEP, PADDING, EPOCH = 8 / 255, 2 / 255, 4, 50_000
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)
OURS = "rst_jax"
PIECES = ("attack", "score gradient", "mask", "update", "data")


def interleaved(runs: dict[str, Run], turns: int) -> tuple[dict[str, list[float]], float]:
    """Seconds of `turns` calls of each, taking turns, after two turns that are not counted; and `others_share`."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    before = processor_seconds()
    for turn in tqdm(range(turns + 2), desc="turns", leave=False, disable=None):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if turn >= 2:
                seconds[name].append(time.perf_counter() - start)
    return seconds, others_share(before, processor_seconds())


def processor_seconds() -> np.ndarray:
    """Processor seconds since the start: of all programs here, of this one, and those there were."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return np.zeros(3)
    user, nice, system, idle, wait, *rest = (int(n) for n in stat.read_text().splitlines()[0].split()[1:9])
    busy, tick = user + nice + system + sum(rest), os.sysconf("SC_CLK_TCK")
    return np.array([busy / tick, sum(os.times()[:2]), (busy + idle + wait) / tick])


def others_share(before: np.ndarray, after: np.ndarray) -> float:
    """The share of the host's processor time that went to other programs in between; 0 where Linux does not say."""
    everybody, own, all_there_was = after - before
    return max(0.0, float((everybody - own) / all_there_was)) if all_there_was else 0.0


class Ours:
    """The project's step and its pieces as compiled programs, the data already on the device.

    Attributes:
      steps: search steps a run.
      runs: the whole and its pieces, by name.
      compile_seconds: tracing and compiling the step.
      peak_bytes: see `peak_memory`; after two runs of the step, before anything else was there.
      forward: operations of a forward pass of one image.
    """

    def __init__(self, o: argparse.Namespace, images: np.ndarray, labels: np.ndarray):
        self.mesh, self.rows = make_mesh(jax.devices()[:1]), o.batch
        self.steps = len(labels) // o.batch
        self.model: Any = ModelSpec(o.model, 10, MEAN, STD).make(dtype=jnp.dtype(o.compute))
        self.sgd = optax.chain(optax.add_decayed_weights(5e-4), optax.sgd(0.1, momentum=0.9))
        flat = on_cpu(self.mesh)
        self.settings = Settings(
            Scores(), ThreatModel(EPS), PGDSettings(o.pgd, STEP), crop_padding=PADDING, flip=True, unroll=flat
        )
        v = init_variables(self.model, images.shape[1:], jax.random.key(0))
        ids = jnp.arange(len(labels), dtype=jnp.int32)
        state = TicketState(jnp.int32(0), v["params"], v["scores"], v["batch_stats"], self.sgd.init(v["scores"]))
        data = Images.of(jnp.asarray(images), jnp.asarray(labels), ids, levels=255)
        kept = subnet.kept_counts(v["scores"], o.ratio)
        self.state, self.data, self.kept, self.order = replicate((state, data, kept, ids), self.mesh)
        self.key: Any = np.asarray(jax.random.key_data(jax.random.key(1)))
        one = jax.ShapeDtypeStruct((1, *images.shape[1:]), jnp.float32)
        self.forward = operations(lambda v, x: self.model.apply(v, x, train=True, mutable=["batch_stats"]), v, one)
        whole, self.compile_seconds = self.search(o.pgd)
        whole(), whole()
        self.peak_bytes = peak_memory()
        self.runs = {OURS: whole, "without attack": self.search(0)[0], **self.pieces()}

    def search(self, attack_steps: int) -> tuple[Run, float]:
        """The step with so many attack steps, and the seconds that it took to trace and compile."""
        settings = dataclasses.replace(self.settings, attack=PGDSettings(attack_steps, STEP))
        many = self.steps > 1
        step = make_train_step(
            self.model, self.sgd, settings, self.mesh, batch_size=self.rows, rows=self.rows, many=many
        )
        args = (self.data, self.order, np.int32(0), self.kept, self.key, np.int32(self.steps))
        box = [jax.tree.map(jnp.copy, self.state)]  # the step takes it
        start = time.perf_counter()
        compiled = step.lower(box[0], *args).compile()
        seconds = time.perf_counter() - start

        def run() -> None:
            box[0], metrics = compiled(box[0], *args)
            jax.block_until_ready((box[0], metrics))

        return run, seconds

    def pieces(self) -> dict[str, Run]:
        """Programs of the step's pieces, each run as often as a run of the whole has steps."""
        s, threat = self.state, self.settings.threat

        @jax.jit
        def batch(step: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
            images, labels, ids = self.data.take(self.order[: self.rows])
            keys = example_keys(jax.random.fold_in(jax.random.wrap_key_data(self.key), step), ids)
            crop_keys, noise_keys = jax.vmap(jax.random.split, out_axes=1)(keys)
            images = augment(crop_keys, images, PADDING, flip=True)
            return images, labels, threat.noise(noise_keys, images)

        @partial(jax.jit, donate_argnums=(0, 1))
        def move(scores: Any, opt_state: Any, gradient: Any) -> tuple[Any, Any]:
            updates, opt_state = self.sgd.update(gradient, opt_state, scores)
            return optax.apply_updates(scores, updates), opt_state

        slow = optax.sgd(1e-9)  # the weights must move, or XLA drops their gradient
        fixed = jax.jit(
            make_update(self.model, slow, Settings(Weights(), threat, PGDSettings(0, 0.0))), donate_argnums=0
        )
        masks = jax.jit(subnet.masks)
        order = jax.jit(lambda epoch: epoch_order(jax.random.wrap_key_data(self.key), epoch, EPOCH))
        drawn, (images, labels, _), now = masks(s.scores, self.kept), batch(s.step), jnp.int32(1)
        frozen = jax.tree.map(jnp.copy, dataclasses.replace(s, opt_state=slow.init(s.params)))
        scores, opt_state = jax.tree.map(jnp.copy, (s.scores, s.opt_state))
        return {
            "score gradient": repeated(lambda state: fixed(state, images, labels, None, drawn)[0], frozen, self.steps),
            "mask": repeated(lambda _: masks(s.scores, self.kept), None, self.steps),
            "update": repeated(lambda c: move(*c, s.scores), (scores, opt_state), self.steps),
            "batch": repeated(lambda _: batch(now), None, self.steps),
            "order": repeated(lambda _: order(now), None, self.steps),
        }

    def split(self, seconds: dict[str, list[float]]) -> dict[str, float]:
        """Median seconds a step of each of `PIECES`."""
        a_step = {name: statistics.median(seconds[name]) / self.steps for name in self.runs}
        both = zip(seconds[OURS], seconds["without attack"], strict=True)
        attack = statistics.median(whole - without for whole, without in both) / self.steps
        data = a_step["batch"] + a_step["order"] * self.rows / EPOCH
        return {name: (a_step | {"attack": attack, "data": data})[name] for name in PIECES}


def repeated(program: Callable[[Any], Any], carry: Any, times: int) -> Run:
    """`carry = program(carry)` so many times, then wait."""
    box = [carry]

    def run() -> None:
        for _ in range(times):
            box[0] = program(box[0])
        jax.block_until_ready(box)

    return run


def peak_memory() -> int:
    """Bytes: of the device's buffers; on a CPU of the process, compiling included."""
    device = jax.devices()[0]
    if device.platform != "cpu":
        return int((device.memory_stats() or {}).get("peak_bytes_in_use", 0))
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def our_products(n: int, times: int, compute: str) -> Run:
    """Matrix products [n, n] x [n, n], random and of norm one, one after the other."""
    a, b = (jax.random.normal(jax.random.key(i), (n, n), jnp.dtype(compute)) for i in range(2))
    b = b / jnp.sqrt(jnp.asarray(n, b.dtype))
    return repeated(partial(jax.jit(lambda b, a: a @ b), b), a, times)


def why_no_torch(o: argparse.Namespace) -> str:
    """Why PyTorch is left out; empty if it is not."""
    platform = jax.devices()[0].platform
    if o.no_torch:
        return "asked for with --no-torch"
    if o.model != "resnet18":
        return f"the PyTorch side knows resnet18 alone, not {o.model}"
    if importlib.util.find_spec("torch") is None:
        return "it is not installed"
    import torch

    if platform != "cpu" and not (platform == "gpu" and torch.cuda.is_available()):
        return f"it does not see the {platform} that JAX does"
    return ""


def torch_batch(images: np.ndarray, labels: np.ndarray, double: bool = False) -> Any:
    """The images for `torch_step`, where JAX computes."""
    import torch
    import torch_step

    device = "cpu" if jax.devices()[0].platform == "cpu" else "cuda"
    dtype = torch.float64 if double else torch.float32
    return torch_step.Batch(images, labels, MEAN, STD, EPS, STEP, device, dtype)


def check(o: argparse.Namespace, images: np.ndarray, labels: np.ndarray) -> bool:
    """Whether PyTorch's two steps agree to 1e-4 in float64, from equal weights, scores and noise; says how near."""
    import torch_step

    distances = torch_step.check(torch_batch(images[:8], labels[:8], double=True), o.ratio, o.pgd)
    for name, distance in distances.items():
        print(f"{name:16} best against released, relative: {distance:.1e}")
    return all(distance < 1e-4 for distance in distances.values())


def hardware() -> str:
    """The name of the chip."""
    device = jax.devices()[0]
    cpuinfo = Path("/proc/cpuinfo")
    if device.platform == "cpu" and cpuinfo.exists():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        return f"{names[0] if names else 'cpu'}, {os.cpu_count()} cores"
    return device.device_kind


def measure(o: argparse.Namespace, images: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    """Everything that is written down."""
    ours = Ours(o, images, labels)
    n, products = (2048, 2) if on_cpu(ours.mesh) else (8192, 20)
    runs, theirs, torch_notes = {OURS: ours.runs[OURS]}, {}, {"left out": why_no_torch(o)}
    if not torch_notes["left out"]:
        import torch_step

        batch = torch_batch(images[: o.batch], labels[: o.batch])
        theirs, torch_notes = torch_step.contenders(batch, o.ratio, o.pgd)
        runs |= {name: torch_step.repeated(step, ours.steps) for name, step in theirs.items()}
        runs["PyTorch's product"] = torch_step.products(n, products, o.compute, batch.x.device)
    runs |= {"product": our_products(n, products, o.compute)} | ours.runs
    seconds, others = interleaved(runs, o.runs)
    a_step = {name: statistics.median(seconds[name]) / ours.steps for name in (OURS, *theirs)}
    needed = step_operations(ours.forward, o.pgd) * o.batch
    best_product = min(s for name in seconds if name.endswith("product") for s in seconds[name])
    rate, split = 2 * n**3 * products / best_product, ours.split(seconds)
    return {
        "command": {name: value for name, value in vars(o).items() if name != "out"},
        "hardware": hardware(),
        "provenance": dataclasses.asdict(provenance()),
        "others_share_of_processors": others,
        "torch": torch_notes,
        "types": {OURS: o.compute} | {name: "bfloat16" if "bfloat16" in name else "float32" for name in theirs},
        "steps_a_run": ours.steps,
        "seconds_a_run": seconds,
        "seconds_a_step": a_step,
        "images_a_second": {name: o.batch / s for name, s in a_step.items()},
        "times_ours": {name: s / a_step[OURS] for name, s in a_step.items()},
        "split": split,
        "split_sum_of_whole": sum(split.values()) / a_step[OURS],
        "compile_seconds": ours.compile_seconds,
        "peak_bytes": ours.peak_bytes,
        "operations_an_image": {"forward": ours.forward, "step": step_operations(ours.forward, o.pgd)},
        "operations_a_second": {name: needed / s for name, s in a_step.items()},
        "product": {"n": n, "a_run": products, "type": o.compute, "operations_a_second": rate},
        "share_of_product": needed / a_step[OURS] / rate,
    }


def table(r: dict[str, Any]) -> str:
    """What a person reads of `measure`."""
    c, a_step, rates = r["command"], r["seconds_a_step"], r["operations_a_second"]
    exponent = 12 if r["product"]["operations_a_second"] >= 1e13 else 9
    flops = {9: "GFLOP/s", 12: "TFLOP/s"}[exponent]
    lines = [
        f"PGD-{c['pgd']} search step, {c['model']}, batch {c['batch']}, ratio {c['ratio']}: {r['hardware']}",
        "",
        f"{'':24}{'ms a step':>10}{'least, most':>18}{'images/s':>10}{flops:>9}{'of ours':>9}",
    ]
    for name, median in a_step.items():
        low, high = (1e3 * f(r["seconds_a_run"][name]) / r["steps_a_run"] for f in (min, max))
        what = name if r["types"][name] in name else f"{name}, {r['types'][name]}"
        spread, images = f"{_short(low)}, {_short(high)}", _short(r["images_a_second"][name])
        rate = _short(rates[name] / 10**exponent)
        lines.append(
            f"{what:27}{_short(1e3 * median):>7}{spread:>18}{images:>10}{rate:>9}{r['times_ours'][name]:>8.2f}x"
        )
    lines += ["", "where our step's time goes"]
    for name, seconds in sorted(r["split"].items(), key=lambda item: -item[1]):
        share = seconds / a_step[OURS]
        lines.append(f"{name:27}{_short(1e3 * seconds):>7}{share:>8.1%}  {'█' * round(40 * share)}")
    total = sum(r["split"].values())
    lines += [f"{'sum':27}{_short(1e3 * total):>7}{r['split_sum_of_whole']:>8.1%}  of the whole", ""]
    product, memory = r["product"], "device buffers" if "cpu" not in r["provenance"]["hardware"] else "process"
    lines += [
        f"{r['operations_an_image']['step'] / 1e9:.3g} GFLOP an image by formula; {r['share_of_product']:.0%} of the "
        f"{_short(product['operations_a_second'] / 10**exponent)} {flops} of a {product['type']} matrix product here",
        f"compiled in {r['compile_seconds']:.1f} s; peak memory {r['peak_bytes'] / 2**30:.2f} GiB ({memory})",
    ]
    if left_out := r["torch"].get("left out"):
        lines.append(f"PyTorch is left out: {left_out}")
    if (others := r["others_share_of_processors"]) > 0.02:
        lines.append(f"NOT ALONE: other programs had {others:.0%} of the processors; measure again without them")
    return "\n".join(lines)


def _short(x: float) -> str:
    """Three digits, all of those before the point."""
    return f"{x:.{max(0, 2 - math.floor(math.log10(x)))}f}" if x > 0 else f"{x:.0f}"


def main() -> None:
    """Parse, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet18", help="a name in rst_jax.models.MODELS")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--ratio", type=float, default=0.1, help="remaining ratio")
    parser.add_argument("--pgd", type=int, default=7, help="attack steps")
    parser.add_argument("--compute", choices=("float32", "bfloat16"), help="ours; default: float32 on a CPU alone")
    parser.add_argument("--runs", type=int, default=5, help="turns that are counted")
    parser.add_argument("--no-torch", action="store_true", help="leave the PyTorch side out")
    parser.add_argument("--check", action="store_true", help="only compare PyTorch's two steps with each other")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    o = parser.parse_args()
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # a GPU's memory is for both
    jax.config.update("jax_enable_compilation_cache", False)
    platform = jax.devices()[0].platform
    o.compute = o.compute or ("float32" if platform == "cpu" else "bfloat16")
    rng, steps = np.random.default_rng(0), 1 if platform == "cpu" else 10
    images = rng.integers(0, 256, (o.batch * steps, 32, 32, 3), np.uint8)
    labels = rng.integers(0, 10, o.batch * steps).astype(np.int32)
    if o.check:
        sys.exit(0 if check(o, images, labels) else 1)
    result = measure(o, images, labels)
    print(table(result))
    path = o.out / f"step_{platform}_{o.model}_b{o.batch}.json"
    write_json(path, result)
    print(f"written: {path}")


if __name__ == "__main__":
    main()
