"""The search step of ResNet-18 in PyTorch, twice on one network: the released code's way, and PyTorch's best.

`released`: NCHW, float32; every layer sorts its scores in every forward pass, and every backward pass of the attack
reaches the scores of all layers.

`best`: channels last; masks once a step, by the threshold that is fastest on this device; the attack differentiates the
images alone; one gradient for the weights at the end, sign(score) * gradient * weight for the scores; float32 (TF32
where the device has it) or bfloat16 autocast; on CUDA compiled, in the mode that is fastest there.

Both attack in training mode, so that each forward pass moves the running statistics, and start at random; neither
augments. `check` holds the two together.
"""

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

Step = Callable[[], Tensor]
THRESHOLDS: dict[str, Callable[[Tensor, int], Tensor]] = {  # of a flat tensor: the value with `below` values before it
    "kthvalue": lambda keys, below: keys.kthvalue(below + 1).values,
    "topk": lambda keys, below: keys.topk(keys.numel() - below, sorted=False).values.min(),
    "sort": lambda keys, below: keys.sort().values[below],
}


class TopK(torch.autograd.Function):
    """The released code's mask: scores sorted, the gradient passed straight through."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, ratio: float) -> Tensor:
        """[...] to 0 and 1."""
        order = scores.flatten().argsort()
        mask = torch.zeros(scores.numel(), device=scores.device)
        mask[order[int((1 - ratio) * scores.numel()) :]] = 1
        return mask.reshape(scores.shape)

    @staticmethod
    def backward(ctx: Any, g: Any) -> Any:
        """The gradient as it came."""
        return g, None


class Conv(nn.Conv2d):
    """A bias-free convolution, padded by half its window."""

    def __init__(self, i: int, o: int, size: int, stride: int = 1):
        super().__init__(i, o, size, stride, size // 2, bias=False)


class Masked(Conv):
    """The released code's layer: a mask made from the scores in every forward pass."""

    def __init__(self, i: int, o: int, size: int, stride: int = 1, *, ratio: float):
        super().__init__(i, o, size, stride)
        self.ratio = ratio
        self.scores = nn.Parameter((torch.rand_like(self.weight) * 2 - 1) / (i * size * size) ** 0.5)
        self.weight.requires_grad = False

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] to [N, out, H / stride, W / stride]."""
        mask: Any = TopK.apply(self.scores.abs(), self.ratio)
        return F.conv2d(x, self.weight * mask, None, self.stride, self.padding)


class Block(nn.Module):
    """A residual block of two 3x3 convolutions."""

    def __init__(self, conv: Callable[..., nn.Module], i: int, o: int, stride: int):
        super().__init__()
        self.a, self.b = conv(i, o, 3, stride), conv(o, o, 3)
        self.na, self.nb = nn.BatchNorm2d(o, affine=False), nn.BatchNorm2d(o, affine=False)
        change = stride != 1 or i != o
        self.short = nn.Sequential(conv(i, o, 1, stride), nn.BatchNorm2d(o, affine=False)) if change else None

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] to [N, out, H / stride, W / stride]."""
        y = self.nb(self.b(F.relu(self.na(self.a(x)))))
        return F.relu(y + (x if self.short is None else self.short(x)))


def resnet18(conv: Callable[..., nn.Module]) -> nn.Sequential:
    """The network for 32x32 images, made of `conv(in, out, size, stride)`."""
    widths = [(64, 64, 1), (64, 64, 1), (64, 128, 2), (128, 128, 1), (128, 256, 2), (256, 256, 1), (256, 512, 2)]
    blocks = [Block(conv, *w) for w in [*widths, (512, 512, 1)]]
    stem = [conv(3, 64, 3), nn.BatchNorm2d(64, affine=False), nn.ReLU()]
    return nn.Sequential(*stem, *blocks, nn.AvgPool2d(4), conv(512, 10, 1), nn.Flatten())


class Batch:
    """Images and labels on the device, in the normalised space where the released code attacks; the ball there."""

    def __init__(
        self,
        images: np.ndarray,
        labels: np.ndarray,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        eps: float,
        size: float,
        device: str,
        dtype: torch.dtype = torch.float32,
    ):
        centre, width = (torch.tensor(v, device=device, dtype=dtype).view(1, 3, 1, 1) for v in (mean, std))
        pixels = torch.tensor(images.transpose(0, 3, 1, 2).copy(), device=device, dtype=dtype)
        self.x = (pixels / 255 - centre) / width
        self.y = torch.tensor(labels, dtype=torch.long, device=device)
        self.low, self.high = (0 - centre) / width, (1 - centre) / width
        self.eps, self.size = eps / width, size / width

    def noise(self) -> Tensor:
        """A uniform draw from the ball, before it is cut to the box."""
        return (torch.rand_like(self.x) * 2 - 1) * self.eps


def convolutions(net: nn.Module) -> list[Any]:
    """The layers that have weights, in order."""
    return [layer for layer in net.modules() if isinstance(layer, nn.Conv2d)]


def _sgd(scores: list[Tensor], **options: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(scores, 0.1, momentum=0.9, weight_decay=5e-4, **options)


def released(net: nn.Module, batch: Batch, pgd: int, noise: Callable[[], Tensor] | None = None) -> Step:
    """The step as the released code does it, on a network of `Masked` layers; the step returns its loss."""
    net.to(batch.x).train()
    sgd = _sgd([p for p in net.parameters() if p.requires_grad])
    x, y, low, high, eps, size = batch.x, batch.y, batch.low, batch.high, batch.eps, batch.size

    def step() -> Tensor:
        _allow_tf32(x.device, False)
        start = (noise or batch.noise)()
        delta = torch.max(torch.min(start, high - x), low - x).requires_grad_()
        for _ in range(pgd):
            F.cross_entropy(net(x + delta), y).backward()
            gradient: Any = delta.grad
            moved = torch.max(torch.min(delta.detach() + size * gradient.sign(), eps), -eps)
            delta.data = torch.max(torch.min(moved, high - x), low - x)
            gradient.zero_()
        loss = F.cross_entropy(net(x + delta.detach()), y)
        sgd.zero_grad()
        loss.backward()
        sgd.step()
        return loss.detach()

    return step


def best(
    net: nn.Module,
    scores: list[Tensor],
    batch: Batch,
    ratio: float,
    pgd: int,
    *,
    half: bool = False,
    threshold: str = "kthvalue",
    mode: str = "eager",
    noise: Callable[[], Tensor] | None = None,
) -> Step:
    """The step as well as PyTorch does it, on a network of plain `Conv` layers; the step returns its loss.

    Args:
      net: its weights are the frozen random ones; the step writes the masked ones in their place.
      scores: of each layer, shaped like its weights.
      batch: what to attack and learn.
      ratio: remaining ratio. The mask keeps the scores from the threshold up: a few more than released if they tie.
      pgd: attack steps.
      half: bfloat16 autocast.
      threshold: a name in `THRESHOLDS`.
      mode: of torch.compile, or "eager".
      noise: where the attack starts, instead of a uniform draw.
    """
    net.to(batch.x, memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    for layer in net.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.num_batches_tracked = None
    used = [layer.weight for layer in convolutions(net)]
    frozen = [w.detach().clone() for w in used]
    scores[:] = [s.to(batch.x, memory_format=torch.channels_last) for s in scores]
    x = batch.x.contiguous(memory_format=torch.channels_last)
    low, high = torch.maximum(batch.low - x, -batch.eps), torch.minimum(batch.high - x, batch.eps)
    sgd = _sgd(scores, fused=True)

    def loss_at(adversarial: Tensor) -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=half):
            return F.cross_entropy(net(adversarial), batch.y)

    compiled: Any = loss_at if mode == "eager" else torch.compile(loss_at, mode=mode)

    def objective(adversarial: Tensor) -> Tensor:
        if mode == "reduce-overhead":
            torch.compiler.cudagraph_mark_step_begin()
        return compiled(adversarial)

    @torch.no_grad()
    def draw() -> None:
        for weight, random, score in zip(used, frozen, scores, strict=True):
            keys = score.abs()
            flat = keys.permute(0, 2, 3, 1).reshape(-1)  # a view of what is channels last
            weight.copy_(random * (keys >= THRESHOLDS[threshold](flat, int((1 - ratio) * flat.numel()))))

    def step() -> Tensor:
        _allow_tf32(x.device, True)
        draw()
        net.requires_grad_(False)
        adversarial = x + torch.clamp((noise or batch.noise)(), low, high)
        for _ in range(pgd):
            adversarial.requires_grad_()
            (gradient,) = torch.autograd.grad(objective(adversarial), adversarial)
            moved = adversarial.detach() - x + batch.size * gradient.sign()
            adversarial = x + torch.clamp(moved, low, high)
        net.requires_grad_(True)
        loss = objective(adversarial)
        gradients: Any = torch.autograd.grad(loss, used)
        for score, gradient, random in zip(scores, gradients, frozen, strict=True):
            score.grad = torch.mul(
                score.sign() * gradient, random, out=torch.empty_like(score)
            )  # strides as the score's
        sgd.step()
        return loss.detach()

    return step


def _allow_tf32(device: torch.device, allowed: bool) -> None:
    """For products on CUDA; convolutions there have it by default."""
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high" if allowed else "highest")


def drawn(net: nn.Module) -> list[Tensor]:
    """Fresh scores for a network of plain layers."""
    return [(torch.rand_like(c.weight) * 2 - 1).detach() / c.weight[0].numel() ** 0.5 for c in convolutions(net)]


def fastest_threshold(ratio: float, device: str) -> tuple[str, dict[str, float]]:
    """The name of the fastest of `THRESHOLDS` over the network's layers, and the seconds of each."""
    keys = [s.abs().flatten().to(device) for s in drawn(resnet18(Conv))]
    seconds = {
        name: timed(lambda f=find: [f(k, int((1 - ratio) * k.numel())) for k in keys], device)  # type: ignore[misc]
        for name, find in THRESHOLDS.items()
    }
    return min(seconds, key=seconds.__getitem__), seconds


def fastest_best(batch: Batch, ratio: float, pgd: int, half: bool, threshold: str) -> tuple[Step, dict[str, Any]]:
    """`best` in the fastest of torch.compile's modes, and the seconds of a step in each; on a CPU not compiled."""
    device = batch.x.device.type
    modes = ("eager", "default", "reduce-overhead") if device == "cuda" else ("eager",)
    tried: dict[str, Any] = {}
    steps: dict[str, Step] = {}
    for mode in modes:
        net = resnet18(Conv)
        steps[mode] = best(net, drawn(net), batch, ratio, pgd, half=half, threshold=threshold, mode=mode)
        try:
            tried[mode] = timed(steps[mode], device) if len(modes) > 1 else None
        except Exception as error:  # torch.compile raises many kinds, where no compiler is for instance
            if mode == "eager":
                raise
            tried[mode] = f"{type(error).__name__}: {error}"[:400]
    mode = min((m for m in modes if not isinstance(tried[m], str)), key=lambda m: tried[m] or 0.0)
    return steps[mode], {"mode": mode, "modes": tried}


def timed(run: Callable[[], Any], device: str) -> float:
    """The least seconds of three calls, after two."""
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        run()
        wait(device)
        seconds.append(time.perf_counter() - start)
    return min(seconds[2:])


def wait(device: str) -> None:
    """Until the device has done what it was given."""
    if device == "cuda":
        torch.cuda.synchronize()


def contenders(batch: Batch, ratio: float, pgd: int) -> tuple[dict[str, Step], dict[str, Any]]:
    """The three steps by name, and what was chosen for them."""
    device = batch.x.device.type
    torch.backends.cudnn.benchmark = True
    threshold, seconds = fastest_threshold(ratio, device)
    steps = {"PyTorch, released": released(resnet18(partial(Masked, ratio=ratio)), batch, pgd)}
    notes: dict[str, Any] = {"version": torch.__version__, "threads": torch.get_num_threads()}
    notes |= {"threshold": threshold, "threshold_seconds": seconds}
    for kind in ("float32", "bfloat16"):
        name = f"PyTorch, best, {kind}"
        steps[name], notes[name] = fastest_best(batch, ratio, pgd, kind == "bfloat16", threshold)
    return steps, notes


def repeated(step: Step, times: int) -> Callable[[], None]:
    """So many steps, then wait."""

    def run() -> None:
        for _ in range(times):
            loss = step()
        wait(loss.device.type)

    return run


def products(n: int, times: int, kind: str, device: torch.device) -> Callable[[], None]:
    """Matrix products [n, n] x [n, n], random, one after the other, in float32 (TF32 on CUDA) or bfloat16."""
    a, b = (torch.randn(n, n, device=device).to(getattr(torch, kind)) for _ in range(2))
    out = torch.empty_like(a)

    def run() -> None:
        _allow_tf32(device, True)
        for _ in range(times):
            torch.mm(a, b, out=out)
        wait(device.type)

    return run


def check(batch: Batch, ratio: float, pgd: int) -> dict[str, float]:
    """Relative distances of `best`, not halved, from `released`, from equal weights, scores and noise, after one step.

    A batch of float64 tells whether they are the same function: in float32 rounding moves a few activations
    across ReLU's kink and turns a few signs in the attack, after which the gradients differ by a percent or more.
    """
    theirs, ours = resnet18(partial(Masked, ratio=ratio)).to(batch.x), resnet18(Conv).to(batch.x)
    scores = []
    for a, b in zip(convolutions(theirs), convolutions(ours), strict=True):
        b.weight.data.copy_(a.weight)
        a.scores.data.uniform_(-1, 1)  # in the batch's type: no two are equal in float64
        scores.append(a.scores.detach().clone())
    start = batch.noise()
    expected = released(theirs, batch, pgd, lambda: start)()
    got = best(ours, scores, batch, ratio, pgd, noise=lambda: start)()

    def distance(a: list[Tensor], b: list[Tensor]) -> float:
        flat_a, flat_b = (torch.cat([t.flatten() for t in v]) for v in (a, b))
        return float((flat_a - flat_b).norm() / flat_a.norm())

    statistics = [[v for name, v in n.named_buffers() if "running" in name] for n in (theirs, ours)]
    return {
        "loss": distance([expected], [got]),
        "score gradient": distance([c.scores.grad for c in convolutions(theirs)], [s.grad for s in scores]),
        "new scores": distance([c.scores.detach() for c in convolutions(theirs)], scores),
        "statistics": distance(*statistics),
    }
