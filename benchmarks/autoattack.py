"""AutoAttack here and in the authors' package, on the same network, images and cores, in one run.

    pip install ".[compare]"
    python benchmarks/autoattack.py digits
    python benchmarks/autoattack.py cifar10 --data FILE.npz  # x_train, y_train, x_test, y_test: uint8 NHWC, integers

Trains a small network adversarially (kept in the folder --kept for the next time), gives the same weights to both, and
prints robust accuracies, how many flags agree, seconds and their ratio, split over the attacks. Seconds of both are
from images to flags, in batches of 250. Ours include compilation, the first time with an empty compilation cache;
"again" forgets all programs and finds them in that cache, as the command does from its second run on. The profile says
what is left: seconds where all programs are there, and what a step of each attack takes beside a pass of the network.
Ends with what was to be reached, and with code 1 where it was not.
"""

import argparse
import gc
import json
import os
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import PartitionSpec

from rst_jax.attacks import autoattack
from rst_jax.attacks.attack import Attack, Problem
from rst_jax.config import PGDSettings
from rst_jax.evaluation.batch import Attacker
from rst_jax.evaluation.cascade import Cascade, run
from rst_jax.evaluation.classifier import Classifier, of_module
from rst_jax.evaluation.evidence import Evidence, Examples
from rst_jax.evaluation.programs import Programs
from rst_jax.initializers import init_variables
from rst_jax.models.resnet import ResNet
from rst_jax.records import provenance
from rst_jax.runtime.files import read_arrays, write_arrays, write_json
from rst_jax.runtime.mesh import AXIS, make_mesh, make_tree, replicate, split_cpu, split_rows
from rst_jax.threat import ThreatModel
from rst_jax.training.state import TicketState
from rst_jax.training.step import Settings, make_update
from rst_jax.training.target import Weights


class SmallNet(nn.Module):
    """Convolutions with ReLU, then dense layers: images [N, H, W, C] in [0, 1] to 10 logits.

    Attributes:
      convolutions: channels of 3x3 convolutions with stride 2.
      patches: side and channels of convolutions whose patches do not overlap; they come first.
      hidden: of the dense layers but the last.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    hidden: tuple[int, ...]
    convolutions: tuple[int, ...] = ()
    patches: tuple[tuple[int, int], ...] = ()

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        """The logits; `train` changes nothing."""
        x = (images - jnp.asarray(self.mean)) / jnp.asarray(self.std)
        for i, (side, features) in enumerate(self.patches):
            n, h, w, c = x.shape
            x = x.reshape(n, h // side, side, w // side, side, c).swapaxes(2, 3).reshape(n, h // side, w // side, -1)
            x = nn.relu(nn.Dense(features, use_bias=False, name=f"patch{i}")(x))
        for i, features in enumerate(self.convolutions):
            x = nn.relu(nn.Conv(features, (3, 3), (2, 2), 1, use_bias=False, name=f"conv{i}")(x))
        x = x.reshape(x.shape[0], -1)
        for i, features in enumerate(self.hidden):
            x = nn.relu(nn.Dense(features, use_bias=False, name=f"dense{i}")(x))
        return nn.Dense(10, use_bias=False, name="head")(x)


MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)  # of CIFAR-10
NETWORKS: dict[str, nn.Module] = {
    "digits": SmallNet((0.3,), (0.37,), hidden=(64, 64)),
    "digits-conv": SmallNet((0.3,), (0.37,), hidden=(32,), convolutions=(8,)),
    "digits-resnet": ResNet(mean=(0.3,), std=(0.37,), blocks=(1,), widths=(16,), stem_stride=2),
    "cifar10": SmallNet(MEAN, STD, hidden=(256,), patches=((4, 64), (2, 128))),
    "cifar10-resnet": ResNet(mean=MEAN, std=STD, blocks=(1, 1), widths=(16, 32), stem_stride=2),
}
EPS = {"digits": 0.12, "cifar10": 8 / 255}
EPOCHS = {"digits": 100, "cifar10": 12}
N = 1000
RATIOS = {"digits": 3.0, "cifar10": 1.5}  # to be reached: their seconds over ours


def data(name: str, path: str) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Training images and labels, and the 1,000 to attack; images float32 in [0, 1]."""
    if name == "digits":
        from sklearn.datasets import load_digits

        bunch = load_digits()
        x, y = (bunch.images / 16).astype(np.float32)[..., None], bunch.target.astype(np.int32)
        return x[N:], y[N:], x[:N], y[:N]
    a = read_arrays(Path(path))
    x, t = (a[k].astype(np.float32) / 255 for k in ("x_train", "x_test"))
    return x, a["y_train"].astype(np.int32), t[:N], a["y_test"][:N].astype(np.int32)


def trained(name: str, model: nn.Module, x: np.ndarray, y: np.ndarray) -> dict[str, Any]:
    """The network after adversarial training with PGD-3: {"params", "batch_stats"}."""
    v = init_variables(model, x.shape[1:], jax.random.key(0), weight_init="kaiming_normal")
    eps, size = EPS[name], 64 if name == "digits" else 128
    steps = EPOCHS[name] * (len(x) // size)
    optimizer = optax.adamw(optax.cosine_decay_schedule(1e-3, steps), weight_decay=5e-4)
    stats = v.get("batch_stats", {})
    state = TicketState(jnp.int32(0), v["params"], {}, stats, optimizer.init(v["params"]))
    rng = np.random.default_rng(0)
    for epoch in range(EPOCHS[name]):
        radius = eps * min(2 * epoch / EPOCHS[name], 1)  # small networks learn nothing where it is whole at once
        settings = Settings(Weights(), ThreatModel(radius), PGDSettings(3, radius / 2), unroll=True)
        update = jax.jit(make_update(model, optimizer, settings))
        order = rng.permutation(len(x))
        for k in range(len(x) // size):
            index = order[k * size : (k + 1) * size]
            images = x[index]
            if name == "cifar10":
                images = np.where(rng.random((size, 1, 1, 1)) < 0.5, images, images[:, :, ::-1])
            noise = rng.uniform(-radius, radius, images.shape).astype(np.float32)
            state, metrics = update(state, images, y[index], noise, {})
        print(f"epoch {epoch + 1}: {float(metrics['correct']) / size:.2f} of the last batch under attack", flush=True)
    return jax.tree.map(np.asarray, {"params": state.params, "batch_stats": state.batch_stats})


def torch_network(model: Any, variables: dict[str, Any]) -> Any:
    """The same network in PyTorch, NCHW in [0, 1], in evaluation mode."""
    import torch
    from torch import nn

    params, stats = variables["params"], variables.get("batch_stats", {})

    def conv(kernel: np.ndarray, stride: int, padding: int | None = None) -> nn.Conv2d:
        size, _, i, o = kernel.shape
        made = nn.Conv2d(i, o, size, stride, size // 2 if padding is None else padding, bias=False)
        made.weight.data = torch.tensor(kernel.transpose(3, 2, 0, 1).copy())
        return made

    def dense(kernel: np.ndarray, channels: int = 1) -> nn.Linear:
        """Of a flattened image with so many channels, which come first here and last there."""
        i, o = kernel.shape
        made = nn.Linear(i, o, bias=False)
        order = kernel.reshape(-1, channels, o).swapaxes(0, 1).reshape(i, o)
        made.weight.data = torch.tensor(order.T.copy())
        return made

    def norm(s: dict[str, np.ndarray]) -> nn.BatchNorm2d:
        made = nn.BatchNorm2d(len(s["mean"]), affine=False)
        made.running_mean, made.running_var = torch.tensor(s["mean"]), torch.tensor(s["var"])
        return made

    class Input(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mean, self.std = (torch.tensor(v).view(1, -1, 1, 1) for v in (model.mean, model.std))

        def forward(self, x: Any) -> Any:
            return (x - self.mean) / self.std

    class Block(nn.Module):
        def __init__(self, p: Any, s: Any, stride: int):
            super().__init__()
            first, second = conv(p["conv1"]["kernel"], stride), conv(p["conv2"]["kernel"], 1)
            self.main = nn.Sequential(first, norm(s["bn1"]), nn.ReLU(), second, norm(s["bn2"]))
            self.side: nn.Module = nn.Identity()
            if "shortcut_0" in p:
                self.side = nn.Sequential(conv(p["shortcut_0"]["kernel"], stride), norm(s["shortcut_1"]))

        def forward(self, x: Any) -> Any:
            return torch.relu(self.main(x) + self.side(x))

    parts: list[nn.Module] = [Input()]
    if isinstance(model, SmallNet):
        channels = len(model.mean)
        for i, (side, features) in enumerate(model.patches):
            kernel = params[f"patch{i}"]["kernel"].reshape(side, side, channels, features)
            parts += [conv(kernel, side, 0), nn.ReLU()]
            channels = features
        for i, features in enumerate(model.convolutions):
            parts += [conv(params[f"conv{i}"]["kernel"], 2), nn.ReLU()]
            channels = features
        parts.append(nn.Flatten())
        for i in range(len(model.hidden)):
            parts += [dense(params[f"dense{i}"]["kernel"], channels if i == 0 else 1), nn.ReLU()]
        parts.append(dense(params["head"]["kernel"]))
    else:
        parts += [conv(params["conv1"]["kernel"], model.stem_stride), norm(stats["bn1"]), nn.ReLU()]
        for stage, count in enumerate(model.blocks, 1):
            for i in range(count):
                place = f"layer{stage}_{i}"
                parts.append(Block(params[place], stats[place], 2 if i == 0 and stage > 1 else 1))
        parts += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), dense(params["fc"]["kernel"])]
    return nn.Sequential(*parts).eval().requires_grad_(False)


def quiet() -> None:
    """Leave what is there to itself: threads that wait for more to do, and objects that a collection would look at."""
    gc.collect()
    gc.freeze()
    time.sleep(1)


def ours(
    model: nn.Module,
    variables: dict[str, Any],
    x: np.ndarray,
    y: np.ndarray,
    eps: float,
    norm: Any,
    faithful: bool = False,
    repeat: bool = False,
) -> tuple[np.ndarray, dict[str, Any]]:
    """Which examples stand, and the seconds and compilations it took."""
    classifier = Classifier(of_module(model), variables)
    cascade = Cascade("AutoAttack", autoattack(faithful), ThreatModel(eps, norm))

    def once() -> tuple[Attacker, Evidence, float]:
        jax.clear_caches()
        quiet()
        start = time.perf_counter()
        programs = Programs(make_mesh(), 250)
        logits = programs.logits(classifier, x, len(x))
        examples = Examples(x, y, np.arange(len(x), dtype=np.int32), logits)
        attacker = Attacker(programs, classifier, examples, np.zeros(2, np.uint32))
        evidence = run(attacker, cascade)
        return attacker, evidence, time.perf_counter() - start

    with tempfile.TemporaryDirectory() as folder:
        compilation_cache.reset_cache()
        jax.config.update("jax_compilation_cache_dir", folder)
        attacker, evidence, total = once()
        compiled, seconds = dict(attacker.programs.compiled), {k: round(v, 1) for k, v in attacker.seconds.items()}
        again = once()[2] if repeat else None
    standing = evidence.standing
    measured = profile(attacker, cascade, x) if repeat else None
    counts = {a.name: int((evidence.attack == k).sum()) for k, a in enumerate(autoattack(faithful))}
    return standing, {
        "robust": float(standing.mean()),
        "broken": counts,
        "unverified": int(evidence.unverified.sum()),
        "seconds": total,
        "seconds again": again,
        "seconds_of": seconds,
        "compiled": compiled,
        "passes": int(evidence.queries.sum() + evidence.gradients.sum()),
        "profile": measured,
    }


def profile(attacker: Attacker, cascade: Cascade, x: np.ndarray) -> dict[str, Any]:
    """Seconds of each attack without compilation; milliseconds of a step at the largest size, and of the network."""
    n, examples, classifier = attacker.sizes[-1], attacker.examples, attacker.classifier
    for _ in range(2):  # in the first, programs are made
        attacker.seconds.clear()
        run(attacker, cascade)
    mesh = attacker.mesh
    variables, eps = replicate((classifier.variables, np.float32(cascade.threat.eps)), mesh)
    arrays = x, examples.logits, examples.labels, np.argsort(-examples.logits)[:, 1].astype(np.int32)
    rows = [np.resize(a, (n, *a.shape[1:])) for a in (*arrays, np.zeros((n, 2), np.uint32))]
    images, *rest = (split_rows(r, mesh) for r in rows)
    fixed = variables, eps, images, *rest

    def start(attack: Attack) -> Any:
        def made(part: slice) -> Any:
            p = Problem(partial(classifier.apply, variables), cascade.threat, *(r[part] for r in rows))
            first, each = attack.sample(p)
            return attack.start(p, first), each

        return make_tree(n, made, mesh)

    passes = {
        "forward": lambda v, z: classifier.apply(v, z),
        "forward and back": jax.grad(lambda v, z: jnp.sum(classifier.apply(v, z)), argnums=1),
    }

    def milliseconds(call: Any, before: Any = tuple) -> float:
        """Of a call with what `before` gives."""

        def once() -> float:
            given = jax.block_until_ready(before())
            start = time.perf_counter()
            jax.block_until_ready(call(*given))
            return 1e3 * (time.perf_counter() - start)

        once()
        return min(once() for _ in range(5))

    told: dict[str, Any] = {"seconds_of": {k: round(v, 2) for k, v in attacker.seconds.items()}, "rows": n, "ms": {}}
    with jax.default_matmul_precision("highest"):
        for name, function in passes.items():
            spread = jax.jit(
                jax.shard_map(
                    function, mesh=mesh, in_specs=(PartitionSpec(), PartitionSpec(AXIS)), out_specs=PartitionSpec(AXIS)
                )
            )
            told["ms"][name] = round(milliseconds(lambda f=spread: [f(variables, images) for _ in range(20)]) / 20, 3)
        zero, last = replicate((np.int32(0), np.int32(90)), mesh)
        for attack in {a.program: a for a in cascade.attacks}.values():
            go_on = attacker.programs.attack(attack, cascade.threat, classifier.apply, fixed)
            calls = 90 if attacker.programs.one_by_one(attack, classifier.apply, fixed) else 1

            def steps(state: Any, sampled: Any, go_on: Any = go_on, calls: int = calls) -> Any:
                i = zero
                for _ in range(calls):
                    state, i = go_on(*fixed, sampled, state, i, last)
                return state

            told["ms"][f"a step of {attack.name}"] = round(milliseconds(steps, partial(start, attack)) / 90, 3)
    return told


def theirs(net: Any, x: np.ndarray, y: np.ndarray, eps: float, norm: str) -> tuple[np.ndarray, dict[str, Any]]:
    """As `ours`, by the authors' package."""
    import logging

    import torch
    from pyautoattack import AutoAttack

    marks: list[tuple[str, float]] = []

    class Marks(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            marks.append((record.getMessage(), time.perf_counter()))

    logger = logging.getLogger("auto-attack")
    logger.setLevel(logging.DEBUG)
    logger.addHandler(Marks())
    images, labels = torch.tensor(x.transpose(0, 3, 1, 2).copy()), torch.tensor(y.astype(np.int64))
    quiet()
    start = time.perf_counter()
    attack = AutoAttack(net, norm={"linf": "Linf", "l2": "L2"}[norm], eps=eps, version="standard", seed=0)
    adversarial, _ = attack.run_standard_evaluation(images, labels, batch_size=250)
    total = time.perf_counter() - start
    logger.handlers.clear()
    with torch.no_grad():
        standing = (net(adversarial).argmax(1) == labels).numpy()
    seconds = {}
    for (text, at), (_, after) in zip(marks, [*marks[1:], ("", start + total)], strict=True):
        if text.startswith("running "):
            name = text.removeprefix("running ")
            ends = [t for m, t in marks if m.startswith(f"robust accuracy after {name.upper()}")]
            seconds[name] = round((ends[0] if ends else after) - at, 1)
    told = {"robust": float(standing.mean()), "seconds": total, "seconds_of": seconds}
    return standing, told


def main() -> int:
    """Compare, print, write; 1 where something was not reached."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=sorted(NETWORKS))
    parser.add_argument("--data", default="", help="the .npz file for cifar10")
    parser.add_argument("--kept", default="/tmp/rst_jax_autoattack", help="where the trained network is kept")
    parser.add_argument("--out", default="", help="write the figures here as JSON")
    parser.add_argument("--norm", choices=("linf", "l2"), default="linf")
    parser.add_argument("--eps", type=float, default=0.0, help="another radius")
    parser.add_argument("--examples", type=int, default=N)
    parser.add_argument("--only-ours", action="store_true")
    parser.add_argument("--once", action="store_true", help="leave the run with a full compilation cache out")
    parser.add_argument("--no-faithful", action="store_true", help="leave our faithful mode out")
    o = parser.parse_args()
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)  # as the command
    split_cpu()
    kind = o.name.split("-")[0]
    x_train, y_train, x, y = data(kind, o.data)
    x, y = x[: o.examples], y[: o.examples]
    model = NETWORKS[o.name]
    kept = Path(o.kept) / f"{o.name}.npz"
    if not kept.exists():
        flat = jax.tree_util.tree_leaves_with_path(trained(kind, model, x_train, y_train))
        write_arrays(kept, {"/".join(p.key for p in path): leaf for path, leaf in flat})
    variables: dict[str, Any] = {}
    for path, leaf in read_arrays(kept).items():
        *folders, last = path.split("/")
        here = variables
        for folder in folders:
            here = here.setdefault(folder, {})
        here[last] = leaf
    eps = o.eps or EPS[kind]
    told: dict[str, Any] = {"data": o.name, "n": len(x), "norm": o.norm, "eps": eps, "network": repr(model)}
    stands: dict[str, np.ndarray] = {}
    mine = np.asarray(model.apply(variables, x[:64], train=False))  # JAX has started
    stands["default"], told["default"] = ours(model, variables, x, y, eps, o.norm, repeat=not o.once)
    print(json.dumps(told["default"]), flush=True)
    if not o.only_ours:
        import torch

        torch.set_num_threads(len(os.sched_getaffinity(0)))
        net = torch_network(model, variables)
        with torch.no_grad():  # PyTorch has started
            gap = float(np.abs(net(torch.tensor(x[:64].transpose(0, 3, 1, 2).copy())).numpy() - mine).max())
        told["largest difference of logits"] = gap
        stands["theirs"], told["theirs"] = theirs(net, x, y, eps, o.norm)
        print(json.dumps(told["theirs"]), flush=True)
        if not o.no_faithful:
            stands["faithful"], told["faithful"] = ours(model, variables, x, y, eps, o.norm, faithful=True)
            print(json.dumps(told["faithful"]), flush=True)
        for name in stands.keys() - {"theirs"}:
            told[name]["flags equal"] = float((stands[name] == stands["theirs"]).mean())
            told[name]["only theirs broke"] = int((stands[name] & ~stands["theirs"]).sum())
            told[name]["only ours broke"] = int((~stands[name] & stands["theirs"]).sum())
            told[name]["times as fast as theirs"] = told["theirs"]["seconds"] / told[name]["seconds"]
            if again := told[name]["seconds again"]:
                told[name]["times as fast again"] = told["theirs"]["seconds"] / again
    told["provenance"] = vars(provenance())
    if not o.only_ours:
        told["reached"] = reached(told, kind)
    print(json.dumps(told, indent=1))
    if o.out:
        write_json(Path(o.out), told)
    return int(not all(told.get("reached", {}).values()))


def reached(told: dict[str, Any], kind: str) -> dict[str, bool]:
    """What was to be reached."""
    default, theirs, faithful = told["default"], told["theirs"], told.get("faithful")
    found = {
        "default never weaker": default["robust"] <= theirs["robust"],
        "default: 99 % of flags equal": default["flags equal"] >= 0.99,
        f"default: {RATIOS[kind]} times as fast": default["times as fast as theirs"] >= RATIOS[kind],
    }
    if faithful:
        found["faithful within .3 points"] = abs(faithful["robust"] - theirs["robust"]) < 0.003 + 1e-9
        found["faithful: 99 % of flags equal"] = faithful["flags equal"] >= 0.99
    return found


if __name__ == "__main__":
    sys.exit(main())
