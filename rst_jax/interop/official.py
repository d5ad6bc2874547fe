"""Checkpoints of the paper's released PyTorch code as our collections."""

import zipfile
from pathlib import Path
from typing import Any, BinaryIO

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from rst_jax.config import Pattern
from rst_jax.runtime.door import check_archive, opened
from rst_jax.runtime.paths import local_path
from rst_jax.subnet import is_kernel, kernels, score_shape

_PATTERNS: dict[int, Pattern] = {4: "element", 3: "row", 2: "kernel", 1: "filter"}  # by the axes of a score


def from_official(
    path: str | Path, model: nn.Module, image_shape: tuple[int, int, int] = (32, 32, 3)
) -> dict[str, PyTree]:
    """The released code's checkpoint as {"params", "scores", "batch_stats"} of `model`.

    A parameter's official name is its path in our tree with "." for "/" and "_". Kernels OIHW become HWIO (or
    IO for a dense layer made from a 1x1 convolution); the pattern is read off each score's shape: OIHW element,
    OIH row, OI kernel, O filter. Values keep the file's type (float64 needs
    JAX_ENABLE_X64; bfloat16 becomes float32). A dense network's checkpoint has no scores.

    Args:
      path: a file that torch.save wrote; read with weights_only=True. Needs PyTorch.
      model: a module of `rst_jax.models`.
      image_shape: [H, W, C] that the model is shaped for.

    Raises:
      ValueError: the file is no such checkpoint, an entry is missing or left over, or a shape does not fit; named. Or
        it is damaged, or its numbers are not finite.
    """
    arrays = _entries(local_path(path))
    images = jnp.zeros((1, *image_shape))
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), images, train=False))
    has_scores = any(name.endswith(".scores") for name in arrays)

    take = _Taker(path, arrays)
    walk = jax.tree_util.tree_map_with_path
    variables = {
        "params": walk(take.param, shapes["params"]),
        "scores": walk(take.score, kernels(shapes["params"])) if has_scores else {},
        "batch_stats": walk(take.statistic, shapes.get("batch_stats", {})),
    }
    if arrays:
        raise ValueError(f"{path}: entries that the model has no place for: {', '.join(sorted(arrays))}.")
    return variables


def _entries(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a checkpoint, by their names within the network; not yet copied out of what it holds."""
    if not path.exists():
        raise ValueError(f"{path}: there is no such checkpoint.")
    with opened(path) as (file, size):
        try:
            _check_sums(file, size)
            saved = _load(path)
        except Exception as error:  # torch.load raises a dozen kinds for a file that is not its own
            told = str(error).split("WeightsUnpickler error: ")[-1].split(" was not an allowed")[0].split("\n")[0][:200]
            raise ValueError(f"{path}: expected a PyTorch checkpoint of tensors and plain values ({told}).") from error
    entries = saved.get("state_dict", saved) if isinstance(saved, dict) else None
    if not isinstance(entries, dict) or not entries or not all(isinstance(name, str) for name in entries):
        raise ValueError(f"{path}: expected a dict of tensors, or one under 'state_dict'.")
    kept = {name: value for name, value in entries.items() if not name.endswith("num_batches_tracked")}
    arrays = {name.removeprefix("module."): _floats(path, name, value) for name, value in kept.items()}
    if len(arrays) < len(kept):
        raise ValueError(f"{path}: two entries have one name but for 'module.'.")
    return arrays


def _check_sums(file: BinaryIO, size: int) -> None:
    """Refuse a damaged archive: torch.load does not look at its sums. (Before PyTorch 1.6 files had none.)"""
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            check_archive(archive, size)
            if broken := archive.testzip():
                raise ValueError(f"{broken} is damaged")


def _load(path: Path) -> Any:
    """What torch.save wrote; beside tensors and plain values it may hold NumPy's numbers, which others have saved."""
    import torch
    from numpy._core.multiarray import scalar

    numbers: list[Any] = [np.dtype, scalar, *(type(np.dtype(letter)) for letter in "?bBhHiIlLqQefd")]
    with torch.serialization.safe_globals([*numbers, (scalar, "numpy.core.multiarray.scalar")]):  # NumPy 1's name
        return torch.load(path, map_location="cpu", weights_only=True)


def _floats(path: Path, name: str, value: Any) -> np.ndarray:
    """A tensor as an array that shares its memory."""
    import torch

    if not isinstance(value, torch.Tensor):
        raise ValueError(f"{path}: expected {name} as a tensor; it is of {type(value).__name__}.")
    value = value.detach()
    known = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    if value.layout != torch.strided or value.dtype not in known or value.device.type != "cpu":
        raise ValueError(f"{path}: expected {name} as floats; it is {value.dtype}, {value.layout}, {value.device}.")
    if value.dtype == torch.bfloat16:  # which NumPy does not have
        return value.view(torch.int16).numpy().view(jnp.bfloat16)
    return value.numpy()


class _Taker:
    """Takes entries out of a checkpoint, each as the leaf of ours that it becomes."""

    def __init__(self, path: str | Path, arrays: dict[str, np.ndarray]):
        self.path, self.arrays = path, arrays

    def _take(self, name: str) -> np.ndarray:
        if name not in self.arrays:
            raise ValueError(f"{self.path}: no entry {name!r}; is it a checkpoint of another network?")
        return self.arrays.pop(name)

    def _fitting(self, name: str, value: np.ndarray, shape: tuple[int, ...], told: str = "") -> jax.Array:
        if value.shape != shape:
            raise ValueError(f"{self.path}: {name} does not fit; expected {shape}{told}, got {value.shape}.")
        if not np.isfinite(value).all():
            raise ValueError(f"{self.path}: {name} is not finite.")
        return jnp.asarray(value.astype(np.float32) if value.dtype == jnp.bfloat16 else value)

    def param(self, path: tuple, struct: jax.ShapeDtypeStruct) -> jax.Array:
        """A kernel, or any other parameter."""
        name = _official(path[:-1]) + (".weight" if path[-1].key == "kernel" else "." + path[-1].key)
        value = self._take(name)
        if is_kernel(path, struct):
            value = _channels_last(value, len(struct.shape))
        return self._fitting(name, value, struct.shape, " (channels last)")

    def score(self, path: tuple, struct: jax.ShapeDtypeStruct) -> jax.Array:
        """The scores of a kernel; their pattern is read off their shape."""
        name = _official(path[:-1]) + ".scores"
        value = self._take(name)
        pattern = _PATTERNS.get(value.ndim)
        shape = score_shape(struct.shape, pattern) if pattern else ()
        outward = value.reshape(value.shape + (1,) * (4 - value.ndim))  # OIHW, 1 where weights share a score
        return self._fitting(name, _channels_last(outward, len(struct.shape)), shape, " (channels last)")

    def statistic(self, path: tuple, struct: jax.ShapeDtypeStruct) -> jax.Array:
        """A running mean or variance."""
        name = f"{_official(path[:-1])}.running_{path[-1].key}"
        return self._fitting(name, self._take(name), struct.shape)


def _official(path: tuple) -> str:
    return ".".join(part.key.replace("_", ".") for part in path)


def _channels_last(value: np.ndarray, axes: int) -> np.ndarray:
    """OIHW as HWIO, or as IO where our layer is dense and the window is 1x1."""
    if value.ndim != 4:
        return value
    turned = value.transpose(2, 3, 1, 0)
    return turned[0, 0] if axes == 2 and turned.shape[:2] == (1, 1) else turned
