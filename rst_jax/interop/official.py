"""Checkpoints of the paper's released PyTorch code as our collections."""

from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from rst_jax.subnet import is_kernel, kernels, score_shape

Tree = Any


def from_official(
    path: str | Path, model: nn.Module, image_shape: tuple[int, int, int] = (32, 32, 3)
) -> dict[str, Tree]:
    """The released code's checkpoint as {"params", "scores", "batch_stats"} of `model`.

    A parameter's official name is its path in our tree with "." for "/" and "_". Kernels OIHW become HWIO (or
    IO for a dense layer made from a 1x1 convolution); the pattern is read off each score's shape: OIHW element,
    OIH row, OI kernel, O filter. Values keep the file's type (float64 needs
    JAX_ENABLE_X64). A dense network's checkpoint has no scores.

    Args:
      path: a file that torch.save wrote; read with weights_only=True. Needs PyTorch.
      model: a module of `rst_jax.models`.
      image_shape: [H, W, C] that the model is shaped for.

    Raises:
      ValueError: the file is no such checkpoint, an entry is missing or left over, or a shape does not fit; named.
    """
    import torch

    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ValueError(f"{path}: there is no such checkpoint.") from None
    except Exception as error:  # torch.load raises a dozen kinds for a file that is not its own
        raise ValueError(f"{path}: expected a PyTorch checkpoint of tensors and plain values; {error}") from error
    entries = saved.get("state_dict", saved) if isinstance(saved, dict) else None
    if not isinstance(entries, dict) or not entries or not all(isinstance(v, torch.Tensor) for v in entries.values()):
        raise ValueError(f"{path}: expected a dict of tensors, or one under 'state_dict'.")
    arrays = {name.removeprefix("module."): value.numpy() for name, value in entries.items()}
    arrays = {name: value for name, value in arrays.items() if not name.endswith("num_batches_tracked")}

    images = jnp.zeros((1, *image_shape))
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), images, train=False))
    has_scores = any(name.endswith(".scores") for name in arrays)

    def take(name: str) -> np.ndarray:
        if name not in arrays:
            raise ValueError(f"{path}: no entry {name!r}; is it a checkpoint of another network?")
        return arrays.pop(name)

    def official(path_: tuple) -> str:
        return ".".join(part.key.replace("_", ".") for part in path_)

    def param(path_: tuple, struct: Any) -> jax.Array:
        name = official(path_[:-1]) + (".weight" if path_[-1].key == "kernel" else "." + path_[-1].key)
        value = take(name)
        if is_kernel(path_, struct):
            value = _channels_last(value, len(struct.shape))
        if value.shape != struct.shape:
            raise ValueError(
                f"{path}: {name} does not fit; expected {struct.shape} (channels last), got {value.shape}."
            )
        return jnp.asarray(value)

    def score(path_: tuple, struct: Any) -> jax.Array:
        name = official(path_[:-1]) + ".scores"
        value = take(name)
        pattern = {4: "element", 3: "row", 2: "kernel", 1: "filter"}.get(value.ndim)
        shape = score_shape(struct.shape, pattern) if pattern else ()  # type: ignore[arg-type]
        outward: np.ndarray = value.reshape(
            value.shape + (1,) * (4 - value.ndim)
        )  # OIHW, 1 where weights share a score
        converted = _channels_last(outward, len(struct.shape))
        if converted.shape != shape:
            raise ValueError(f"{path}: {name} does not fit; expected {shape} (channels last), got {converted.shape}.")
        return jnp.asarray(converted)

    def statistic(path_: tuple, struct: Any) -> jax.Array:
        name = f"{official(path_[:-1])}.running_{path_[-1].key}"
        value = take(name)
        if value.shape != struct.shape:
            raise ValueError(f"{path}: {name} does not fit; expected {struct.shape}, got {value.shape}.")
        return jnp.asarray(value)

    walk = jax.tree_util.tree_map_with_path
    variables = {
        "params": walk(param, shapes["params"]),
        "scores": walk(score, kernels(shapes["params"])) if has_scores else {},
        "batch_stats": walk(statistic, shapes.get("batch_stats", {})),
    }
    if arrays:
        raise ValueError(f"{path}: entries that the model has no place for: {', '.join(sorted(arrays))}.")
    return variables


def _channels_last(value: np.ndarray, axes: int) -> np.ndarray:
    """OIHW as HWIO, or as IO where our layer is dense and the window is 1x1."""
    if value.ndim != 4:
        return value
    turned = value.transpose(2, 3, 1, 0)
    return turned[0, 0] if axes == 2 and turned.shape[:2] == (1, 1) else turned
