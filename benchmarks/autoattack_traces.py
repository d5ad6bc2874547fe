"""Record the authors' attacks (package pyautoattack) step by step, in float64, on a tiny network.

    python benchmarks/autoattack_traces.py [tests/golden/autoattack_traces.npz]

Their classes run as they are. What a step did is read where it happened: the network looks into the frame of the
attack that calls it. All images are written [N, H, W, C], trajectories with time as the last axis: there a pixel that
stays at the edge of the ball packs well.
"""

import argparse
import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any
from unittest import mock

import numpy as np
import torch
from pyautoattack.autopgd_base import APGDAttack, APGDAttack_targeted
from pyautoattack.fab_pt import FABAttack_PT
from pyautoattack.square import SquareAttack
from torch import Tensor

Trace = dict[str, Any]  # arrays

SHAPE, CLASSES, EXAMPLES = (6, 5, 2), 5, 5
SEED = 3
# Norm, loss, eps, rho. Of the five examples, some break at once, some late and some never (cross-entropy: none late).
APGD = {
    "linf-ce": ("linf", "ce", 0.026, 0.75),
    "linf-dlr": ("linf", "dlr", 0.0251, 0.75),
    "linf-dlr-targeted": ("linf", "dlr-targeted", 0.046, 0.75),
    "l2-ce": ("l2", "ce", 0.128, 0.75),
    "l2-dlr": ("l2", "dlr", 0.128, 0.75),
    "l2-dlr-targeted": ("l2", "dlr-targeted", 0.126, 0.75),
    # Here the 0 in place of the first loss decides at the first checkpoint; at .75 every example is halved there.
    "wrapped": ("linf", "dlr", 0.036, 0.7),
}
FAB = {"linf": 0.03, "l2": 0.14}
SQUARE = {"linf": 0.07, "l2": 0.19}
NORMS = {"linf": "Linf", "l2": "L2"}
RANKS = (2, 3)
QUERIES = 400


@contextlib.contextmanager
def float64() -> Iterator[None]:
    """New tensors are float64, and so is what `.float()` returns."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with mock.patch.object(torch.Tensor, "float", torch.Tensor.double):
            yield
    finally:
        torch.set_default_dtype(before)


class Network:
    """Convolution (stride 1, no padding), ReLU, dense; on images [N, C, H, W]."""

    def __init__(self, seed: int):
        rng = np.random.default_rng(seed)
        h, w, c = SHAPE
        self.weights = {
            "kernel": rng.normal(size=(3, 3, c, 8)) / np.sqrt(9 * c),
            "bias": rng.normal(size=8) / 4,
            "head": rng.normal(size=((h - 2) * (w - 2) * 8, CLASSES)) / np.sqrt((h - 2) * (w - 2) * 8),
        }
        self.tensors = {name: torch.tensor(value) for name, value in self.weights.items()}
        self.look: Callable[[Tensor], None] = lambda x: None

    @contextlib.contextmanager
    def watched(self, look: Callable[[Tensor], None]) -> Iterator[None]:
        """`look` is called before each pass, with the images."""
        self.look, before = look, self.look
        yield
        self.look = before

    def __call__(self, x: Tensor) -> Tensor:
        """Logits."""
        self.look(x.detach().clone())
        hidden = torch.conv2d(x - 0.5, self.tensors["kernel"].permute(3, 2, 0, 1), self.tensors["bias"])
        return torch.relu(hidden).permute(0, 2, 3, 1).flatten(1) @ self.tensors["head"]


def caller(function: Callable[..., Any]) -> dict[str, Any]:
    """The local variables of the nearest call of `function` that is under way."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code is not function.__code__:
        frame = frame.f_back
    assert frame is not None
    return frame.f_locals


def called(function: Callable[..., Any], *args: Any, **kw: Any) -> tuple[Any, dict[str, Any]]:
    """What a method returns, and its local variables at that moment."""
    code, last = function.__code__, {}

    def at_return(frame: FrameType, event: str, _: Any) -> None:
        if event == "return" and frame.f_code is code:
            last.update(frame.f_locals)

    sys.setprofile(at_return)
    try:
        return function(*args, **kw), last
    finally:
        sys.setprofile(None)


def nhwc(x: Tensor) -> np.ndarray:
    """[..., C, H, W] as an array [..., H, W, C]."""
    return np.moveaxis(x.detach().numpy(), -3, -1)


def over_time(images: list[Tensor]) -> np.ndarray:
    """[N, H, W, C, time]."""
    return np.stack([nhwc(x) for x in images], -1)


def apgd(network: Network, x: Tensor, y: Tensor, norm: str, loss: str, eps: float, rho: float) -> Trace:
    """Every image that was evaluated, its loss, the step size of each step, and what came out."""
    kind, extra = (APGDAttack_targeted, {}) if loss == "dlr-targeted" else (APGDAttack, {"loss": loss})
    attack = kind(network, norm=NORMS[norm], n_iter=100, eps=eps, rho=rho, **extra)
    attack.init_hyperparam(x)
    attack.y_target = network(x).sort(dim=1)[1][:, -RANKS[0]]
    seen, sizes, first = [], [], []

    def look(image: Tensor) -> None:
        now = caller(APGDAttack.attack_single_run)
        seen.append(image)
        if "step_size" in now:
            sizes.append(now["step_size"].flatten().clone())
        if len(seen) == 2:  # after the start, before any step has changed it
            first.append(now["loss_best"].clone())

    torch.manual_seed(0)
    with network.watched(look):
        (best, robust, best_loss, adversarial), last = called(attack.attack_single_run, x, y)
    sizes.append(last["step_size"].flatten())
    logits = torch.stack([network(image) for image in seen])
    place = (logits > logits.gather(2, y.expand(len(seen), -1)[..., None])).sum(-1)
    if loss == "dlr" and bool((place == 2).any()):
        raise ValueError("A label ranks third: there DLR is constant and its gradient mere rounding; take another eps.")
    return {
        "eps": eps,
        "rho": rho,
        "noise": nhwc(last["t"]),
        "x": over_time(seen),
        "losses": torch.cat([first[0][None], last["loss_steps"]]).numpy(),
        "sizes": torch.stack(sizes).numpy(),
        "robust": last["acc_steps"].numpy() > 0,
        "best": nhwc(best),
        "best_loss": best_loss.numpy(),
        "broken": ~robust.numpy(),
        "adversarial": nhwc(adversarial),
    }


def fab(network: Network, x: Tensor, y: Tensor, norm: str, eps: float, rank: int | None) -> Trace:
    """How far the closest adversarial image is after each step; with a target, every image looked at, too."""
    attack = FABAttack_PT(network, norm=NORMS[norm], n_iter=100, eps=eps, targeted=rank is not None)
    attack.target_class = rank
    seen, closest = [], []

    def look(image: Tensor) -> None:
        now = caller(FABAttack_PT.attack_single_run)
        if "counter_iter" in now:  # passes before the first step look at the clean images
            seen.append(image)
            closest.append(now["res2"].clone())

    with network.watched(look):
        found, last = called(attack.attack_single_run, x, y, is_targeted=rank is not None)
    # A step has two passes: where it stands, and where it went.
    trace = {"eps": eps, "closest": torch.stack([*closest[2::2], last["res2"]]).numpy(), "found": nhwc(found)}
    return trace | {"x": over_time(seen[1::2])} if rank else trace


class WatchedSquare(SquareAttack):
    """Their Square Attack, which notes what it draws, what it proposes and the margins."""

    def __init__(self, *args: Any, **kw: Any):
        super().__init__(*args, **kw)
        self.queries: list[dict[str, Any]] = []
        self.signs, self.upright = torch.zeros(0), False

    def random_choice(self, shape: list[int]) -> Tensor:
        """Signs."""
        self.signs = super().random_choice(shape)
        return self.signs

    def eta(self, s: int) -> Tensor:
        """A pattern; upright where its first row is of one sign."""
        drawn = super().eta(s)
        self.upright = bool(drawn[0, -1] > 0)
        return drawn

    def margin_and_loss(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Also called once for the start, where nothing has been drawn yet."""
        now = caller(SquareAttack.attack_single_run)
        margin, loss = super().margin_and_loss(x, y)
        corners = [int(now[name]) if name in now and "i_iter" in now else 0 for name in ("vh", "vw", "vh2", "vw2")]
        self.queries.append(
            {
                "rows": now["idx_to_fool"].reshape(-1).numpy() if "i_iter" in now else np.arange(len(x)),
                "best": now["x_best"].clone(),
                "start": nhwc(now.get("delta_init", self.signs)),
                "corners": corners,
                "signs": self.signs.numpy(),
                "upright": self.upright,
                "margin": margin.numpy().copy(),
            }
        )
        return margin, loss


def square(network: Network, x: Tensor, y: Tensor, norm: str, eps: float) -> Trace:
    """The start, and of each query the draw, the margin of the proposal, whether it was accepted, and the image then.

    Rows of examples that had been broken hold nan, and signs of 1.
    """
    attack = WatchedSquare(network, norm=NORMS[norm], n_queries=QUERIES, eps=eps, resc_schedule=False)
    attack.init_hyperparam(x)
    torch.manual_seed(0)
    counts, best = attack.attack_single_run(x, y)
    start, *queries = attack.queries
    margins = np.full((len(queries), len(x)), np.nan)
    signs = np.ones((len(queries), len(x), x.shape[1]), np.int8)
    for q, query in enumerate(queries):
        margins[q, query["rows"]] = query["margin"]
        drawn = query["signs"].reshape(-1, x.shape[1])
        signs[q, query["rows"]] = np.broadcast_to(drawn, (len(query["rows"]), x.shape[1]))
    images = np.stack([nhwc(image) for image in [*(query["best"] for query in queries), best]])
    # Where a square is up already, a proposal to put it up moves it by a rounding error, or not; that is no change.
    accepted = np.max(np.abs(images[1:] - images[:-1]), axis=(2, 3, 4)) > 1e-12
    return {
        "eps": eps,
        "noise": np.broadcast_to(start["start"], nhwc(x).shape),
        "start": images[0],
        "start_margin": start["margin"],
        "corners": np.array([query["corners"] for query in queries], np.int8),
        "signs": signs,
        "upright": np.array([query["upright"] for query in queries]),
        "margins": margins,
        "accepted": accepted,
        "images": images[1:][accepted],
        "counts": counts.numpy().astype(np.int32),
    }


def ratios() -> Trace:
    """DLR, targeted DLR and their gradients on random logits, and the L2 patterns of Square."""
    rng = np.random.default_rng(5)
    logits = rng.normal(size=(40, CLASSES)) * 3
    labels = rng.integers(0, CLASSES, 40)
    targets = (labels + rng.integers(1, CLASSES, 40)) % CLASSES
    attack = APGDAttack_targeted(None, eps=1.0)
    attack.y_target = torch.tensor(targets)
    trace = {"logits": logits, "labels": labels, "targets": targets}
    for name, loss in (("dlr", attack.dlr_loss), ("targeted", attack.dlr_loss_targeted)):
        z = torch.tensor(logits, requires_grad=True)
        values = loss(z, torch.tensor(labels))
        trace[name] = values.detach().numpy()
        trace[f"{name}_gradient"] = torch.autograd.grad(values.sum(), z)[0].numpy()
    patterns = SquareAttack(None, norm="L2", eps=1.0, device="cpu")
    for side in range(1, 10):
        drawn = patterns.eta(side)
        trace[f"pattern{side}"] = (drawn if drawn[0, -1] > 0 or side == 1 else drawn.T).numpy()
    return trace


def record() -> Trace:
    """All of it, with names "what/entry"."""
    network = Network(SEED)
    rng = np.random.default_rng(2)
    h, w, c = SHAPE
    images = np.clip(rng.uniform(-0.1, 1.1, (EXAMPLES, h, w, c)), 0, 1)  # some pixels lie at the edge of the box
    x = torch.tensor(images).permute(0, 3, 1, 2).contiguous()
    y = network(x).argmax(1)
    parts = {"network": network.weights, "examples": {"images": images, "labels": y.numpy()}, "ratios": ratios()}
    for name, settings in APGD.items():
        parts[f"apgd-{name}"] = apgd(network, x, y, *settings)
    for norm in NORMS:
        for rank in (*RANKS, None):
            parts[f"fab-{norm}-{rank or 'nearest'}"] = fab(network, x, y, norm, FAB[norm], rank)
        parts[f"square-{norm}"] = square(network, x, y, norm, SQUARE[norm])
    return {f"{part}/{name}": np.asarray(value) for part, trace in parts.items() for name, value in trace.items()}


def main() -> None:
    """Write the file and say what broke when."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", nargs="?", type=Path, default=Path("tests/golden/autoattack_traces.npz"))
    path = parser.parse_args().path
    torch.set_num_threads(1)
    with float64():
        traces = record()
    np.savez_compressed(path, **traces)
    for name, value in traces.items():
        if name.endswith("/robust"):
            print(f"{name}: broken after {[int(n) if n <= 100 else 'never' for n in value.sum(0)]} steps")
        if name.endswith(("/counts", "/closest")):
            print(f"{name}: {value if name.endswith('counts') else value[-1].round(4)}")
    print(f"{path}: {path.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
