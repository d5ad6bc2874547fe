"""How long a PGD-7 search step takes, beside the released code's way of doing it in PyTorch, in one run.

    python benchmarks/step.py --model resnet18 --batch 32 --ratio 0.1

Prints the median, least and greatest seconds of each and the ratio of the medians, and writes them with the machine and
the versions to benchmarks/results/. The PyTorch side (needs torch) does what the released code does: every layer
sorts its scores in every forward, and every backward of the attack reaches the scores of all layers.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rst_jax import subnet
from rst_jax.data.pipeline import Images
from rst_jax.mesh import make_mesh, replicate
from rst_jax.models import make_model
from rst_jax.records import provenance
from rst_jax.state import TicketState, init_variables
from rst_jax.step import Settings, make_train_step
from rst_jax.threat import ThreatModel

EPS, STEP, STEPS = 8 / 255, 2 / 255, 7
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)


def timed(run: Callable[[], Any], runs: int) -> list[float]:
    """Seconds of each of `runs` calls, after one that is not counted."""
    run()
    seconds = []
    for _ in range(runs):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return seconds


def ours(name: str, images: np.ndarray, labels: np.ndarray, ratio: float, runs: int) -> dict[str, Any]:
    """The project's own step, data already on the device."""
    on_cpu = jax.devices()[0].platform == "cpu"
    model: Any = make_model(name, 10, MEAN, STD, dtype=jnp.float32 if on_cpu else jnp.bfloat16)
    mesh, rows = make_mesh(jax.devices()[:1]), len(labels)
    sgd = optax.chain(optax.add_decayed_weights(5e-4), optax.sgd(0.1, momentum=0.9))
    settings = Settings("scores", ThreatModel(EPS), STEPS, STEP, crop_padding=4, flip=True, unroll=on_cpu)
    step = make_train_step(model, sgd, settings, mesh, batch_size=rows, rows=rows)
    v = init_variables(model, images.shape[1:], jax.random.key(0))
    state = TicketState(jnp.int32(0), v["params"], v["scores"], v["batch_stats"], sgd.init(v["scores"]))
    kept = subnet.kept_counts(v["scores"], ratio)
    data = Images(jnp.asarray(images), jnp.asarray(labels), jnp.arange(rows, dtype=jnp.int32), levels=255)
    state, data, kept, order = replicate((state, data, kept, jnp.arange(rows, dtype=jnp.int32)), mesh)
    key = np.asarray(jax.random.key_data(jax.random.key(1)))
    args = (data, order, np.int32(0), kept, key, np.int32(1))
    start = time.perf_counter()
    compiled = step.lower(state, *args).compile()
    compile_s = time.perf_counter() - start
    box = [state]

    def run() -> None:
        box[0], metrics = compiled(box[0], *args)
        jax.block_until_ready((box[0], metrics))

    masks = jax.jit(subnet.masks)
    mask_s = timed(lambda: jax.block_until_ready(masks(box[0].scores, kept)), runs)
    dtype = str(jnp.dtype(model.dtype))
    return {"seconds": timed(run, runs), "mask_seconds": mask_s, "compile_seconds": compile_s, "dtype": dtype}


def released(name: str, images: np.ndarray, labels: np.ndarray, ratio: float, runs: int) -> dict[str, Any]:
    """The step as the released code does it: NCHW float32, sorted masks in every forward, gradients to all leaves."""
    import torch
    from torch import nn
    from torch.nn import functional as F

    class TopK(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, scores: Any) -> Any:
            order = scores.flatten().argsort()
            mask = torch.zeros(scores.numel(), device=scores.device)
            mask[order[int((1 - ratio) * scores.numel()) :]] = 1
            return mask.reshape(scores.shape)

        @staticmethod
        def backward(ctx: Any, g: Any) -> Any:
            return g

    class Masked(nn.Conv2d):
        def __init__(self, i: int, o: int, size: int, stride: int = 1):
            super().__init__(i, o, size, stride, size // 2, bias=False)
            self.scores = nn.Parameter((torch.rand_like(self.weight) * 2 - 1) / (i * size * size) ** 0.5)
            self.weight.requires_grad = False

        def forward(self, x: Any) -> Any:
            return F.conv2d(x, self.weight * TopK.apply(self.scores.abs()), None, self.stride, self.padding)

    class Block(nn.Module):
        def __init__(self, i: int, o: int, stride: int):
            super().__init__()
            self.a, self.b = Masked(i, o, 3, stride), Masked(o, o, 3)
            self.na, self.nb = nn.BatchNorm2d(o, affine=False), nn.BatchNorm2d(o, affine=False)
            change = stride != 1 or i != o
            self.short = nn.Sequential(Masked(i, o, 1, stride), nn.BatchNorm2d(o, affine=False)) if change else None

        def forward(self, x: Any) -> Any:
            y = self.nb(self.b(F.relu(self.na(self.a(x)))))
            return F.relu(y + (x if self.short is None else self.short(x)))

    if name != "resnet18":
        raise ValueError(f"the PyTorch side knows resnet18 alone; got {name}. Take --no-torch.")
    widths = [(64, 64, 1), (64, 64, 1), (64, 128, 2), (128, 128, 1), (128, 256, 2), (256, 256, 1), (256, 512, 2)]
    blocks = [Block(*w) for w in [*widths, (512, 512, 1)]]
    net = nn.Sequential(
        Masked(3, 64, 3), nn.BatchNorm2d(64, affine=False), nn.ReLU(), *blocks, nn.AvgPool2d(4), Masked(512, 10, 1),
        nn.Flatten(),
    )  # fmt: skip
    device = "cuda" if torch.cuda.is_available() else "cpu"
    net.to(device).train()
    trained = [p for p in net.parameters() if p.requires_grad]
    sgd = torch.optim.SGD(trained, 0.1, momentum=0.9, weight_decay=5e-4)
    mean, std = (torch.tensor(v, device=device).view(1, 3, 1, 1) for v in (MEAN, STD))
    x = (torch.tensor(images.transpose(0, 3, 1, 2), device=device) / 255 - mean) / std
    y = torch.tensor(labels, dtype=torch.long, device=device)
    low, high, eps, size = (0 - mean) / std, (1 - mean) / std, EPS / std, STEP / std

    def step() -> None:
        delta = torch.max(torch.min((torch.rand_like(x) * 2 - 1) * eps, high - x), low - x).requires_grad_()
        for _ in range(STEPS):
            F.cross_entropy(net(x + delta), y).backward()
            gradient: Any = delta.grad
            moved = torch.max(torch.min(delta.detach() + size * gradient.sign(), eps), -eps)
            delta.data = torch.max(torch.min(moved, high - x), low - x)
            gradient.zero_()
        loss = F.cross_entropy(net(x + delta.detach()), y)
        sgd.zero_grad()
        loss.backward()
        sgd.step()
        if device == "cuda":
            torch.cuda.synchronize()

    return {"seconds": timed(step, runs), "dtype": "float32", "version": torch.__version__}


def main() -> None:
    """Parse, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--ratio", type=float, default=0.1)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--no-torch", action="store_true", help="leave the PyTorch side out")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (args.batch, 32, 32, 3), np.uint8)
    labels = rng.integers(0, 10, args.batch).astype(np.int32)
    measured = {"rst_jax": ours(args.model, images, labels, args.ratio, args.runs)}
    if not args.no_torch:
        measured["released way, PyTorch"] = released(args.model, images, labels, args.ratio, args.runs)
    for name, m in measured.items():
        s = m["seconds"]
        median = statistics.median(s)
        rate = f"{args.batch / median:.1f} images/s, {m['dtype']}"
        print(f"{name:24} median {median:.3f} s [{min(s):.3f}, {max(s):.3f}]  {rate}")
    mine = measured["rst_jax"]
    print(
        f"{'compile':24} {mine['compile_seconds']:.1f} s; masks {statistics.median(mine['mask_seconds']):.3f} s a step"
    )
    result: dict[str, Any] = {
        "command": vars(args) | {"out": None},
        "measured": measured,
        "provenance": vars(provenance()),
    }
    if len(measured) == 2:
        medians = [statistics.median(m["seconds"]) for m in measured.values()]
        result["ratio"] = medians[1] / medians[0]
        print(f"{'ratio of the medians':24} {result['ratio']:.2f}")
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"step_{jax.devices()[0].platform}_{args.model}_b{args.batch}.json"
    path.write_text(json.dumps(result, indent=2) + "\n")
    print(f"written: {path}")


if __name__ == "__main__":
    main()
