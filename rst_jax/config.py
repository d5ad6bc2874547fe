"""The configuration as frozen dataclasses: made once from a ConfigDict, checked once, read everywhere.

`configs/base.py` explains every field; here are their types and the checks across them.
"""

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal

Pattern = Literal["element", "row", "kernel", "filter"]
Task = Literal["draw", "search", "evaluate", "transfer", "r2s", "report"]


@dataclasses.dataclass(frozen=True)
class Threat:
    """The threat model's norm and radius, in [0, 1] image units."""

    norm: Literal["linf", "l2"]
    eps: float


@dataclasses.dataclass(frozen=True)
class Attack:
    """The inner maximisation of training."""

    steps: int
    step_size: float
    random_start: bool
    batch_norm: Literal["train", "eval"]
    early_steps: int
    early_epochs: int

    def steps_in(self, epoch: int) -> int:
        """Gradient steps of the attack in an epoch, counted from 0."""
        return self.early_steps if epoch < self.early_epochs else self.steps


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """SGD and the schedule of its rate."""

    learning_rate: float
    momentum: float
    nesterov: bool
    weight_decay: float
    schedule: Literal["piecewise", "multistep", "cosine", "linear"]
    boundaries: tuple[int, ...]
    decay_every: int
    decay_factor: float
    warmup_epochs: int
    unit: Literal["epoch", "step"]


@dataclasses.dataclass(frozen=True)
class Dense:
    """What differs when all weights are trained."""

    train: bool
    learning_rate: float
    weight_decay: float
    epochs: int


@dataclasses.dataclass(frozen=True)
class Evaluate:
    """The evaluation attack (PGD), how often the held-out images are attacked, and the card at the end."""

    steps: int
    step_size: float
    batch_size: int
    examples: int
    every_epochs: int
    card: Literal["pgd", "autoattack", "full"]


@dataclasses.dataclass(frozen=True)
class Config:
    """A whole run. Fields as in `configs/base.py`."""

    task: Task
    seed: int
    model: str
    remaining_ratios: tuple[float, ...]
    pattern: Pattern
    weight_init: str
    scale_fan: bool
    dataset: str
    data_dir: str
    data_path: str
    holdout: int
    train_examples: int
    select_on: Literal["holdout", "test"]
    crop_padding: int
    flip: bool
    threat: Threat
    attack: Attack
    batch_size: int
    epochs: int
    accumulate: int
    label_smoothing: float
    optimizer: Optimizer
    dense: Dense
    evaluate: Evaluate
    compute_dtype: Literal["auto", "float32", "bfloat16", "float64"]
    bn_sync: bool
    remat: bool
    unroll: Literal["auto", "scan", "unroll"]
    steps_per_dispatch: int
    compilation_cache: str
    checkpoint_every_epochs: int
    log_every_steps: int

    def __post_init__(self) -> None:
        _check(self)

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists and numbers, for JSON."""
        return dataclasses.asdict(self)


def from_dict(fields: Mapping[str, Any]) -> Config:
    """A ConfigDict (or a dict of dicts) as a checked Config.

    Raises:
      ValueError: an unknown field (the nearest known one is named), a missing one, a wrong type, or a value
        outside its range; the message says what was expected, what was got and what to do.
    """
    return _build(Config, fields, "")


def unknown_field(name: str, known: typing.Iterable[str]) -> str:
    """The sentence for a field that does not exist."""
    near = difflib.get_close_matches(name.rsplit(".")[-1], [k.rsplit(".")[-1] for k in known], n=1)
    full = [k for k in known if near and k.rsplit(".")[-1] == near[0]]
    hint = f"did you mean {full[0]!r}?" if full else "configs/base.py lists all of them."
    return f"config: there is no field {name!r}; {hint}"


def field_names(cls: type = Config, prefix: str = "") -> list[str]:
    """All dotted field names, sections included."""
    names: list[str] = []
    for field in dataclasses.fields(cls):
        names.append(prefix + field.name)
        if dataclasses.is_dataclass(field.type):
            names += field_names(typing.cast(type, field.type), prefix + field.name + ".")
    return names


def _build(cls: Any, fields: Mapping[str, Any], prefix: str) -> Any:
    if not isinstance(fields, Mapping) and not hasattr(fields, "items"):
        raise ValueError(f"config: {prefix[:-1]!r} is a section; expected fields in it, got {fields!r}.")
    known = {field.name: field.type for field in dataclasses.fields(cls)}
    for name in fields:
        if name not in known:
            raise ValueError(unknown_field(prefix + name, field_names()))
    missing = [prefix + name for name in known if name not in fields]
    if missing:
        raise ValueError(f"config: missing {', '.join(missing)}; start from configs/base.py, which sets every field.")
    values = {}
    for name, kind in known.items():
        value = fields[name]
        is_section = dataclasses.is_dataclass(kind)
        values[name] = _build(kind, value, prefix + name + ".") if is_section else _cast(value, kind, prefix + name)
    return cls(**values)


def _cast(value: Any, kind: Any, name: str) -> Any:
    origin = typing.get_origin(kind)
    if origin is Literal:
        choices = typing.get_args(kind)
        if value not in choices:
            raise ValueError(f"config: {name} must be one of {', '.join(choices)}; got {value!r}.")
        return value
    if origin is tuple:
        item = typing.get_args(kind)[0]
        values = value if isinstance(value, (tuple, list)) else (value,)
        return tuple(_cast(v, item, name) for v in values)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        expected = kind.__name__ if isinstance(kind, (type, types.GenericAlias)) else str(kind)
        raise ValueError(f"config: {name} must be a {expected}; got {value!r}.")
    return value


def _check(c: Config) -> None:
    def need(ok: bool, name: str, expected: str, got: Any, fix: str = "") -> None:
        if not ok:
            raise ValueError(f"config: {name} must be {expected}; got {got}.{' ' + fix if fix else ''}")

    pixels = "Images lie in [0, 1]: write eight pixel levels as 8/255."
    need(len(c.remaining_ratios) > 0, "remaining_ratios", "at least one fraction", "none")
    for ratio in c.remaining_ratios:
        need(
            0 < ratio <= 1,
            "remaining_ratios",
            "fractions in (0, 1]",
            ratio,
            "They are the fractions of weights kept.",
        )
    names = {f"{ratio:g}" for ratio in c.remaining_ratios}
    need(len(names) == len(c.remaining_ratios), "remaining_ratios", "distinct to six digits", c.remaining_ratios)
    need(c.seed < 2**32, "seed", "below 2**32", c.seed)
    need(
        not c.scale_fan or len(c.remaining_ratios) == 1,
        "scale_fan",
        "False when several ratios share one set of weights",
        True,
        "Draw one ratio a run.",
    )
    need(c.threat.eps >= 0, "threat.eps", "at least 0", c.threat.eps)
    need(c.threat.eps <= 1 or c.threat.norm == "l2", "threat.eps", "in [0, 1]", c.threat.eps, pixels)
    for section, attack in (("attack", c.attack), ("evaluate", c.evaluate)):
        need(attack.steps >= 0, f"{section}.steps", "at least 0", attack.steps)
        need(
            0 <= attack.step_size <= 1 or c.threat.norm == "l2",
            f"{section}.step_size",
            "in [0, 1]",
            attack.step_size,
            pixels,
        )
    need(0 <= c.label_smoothing < 1, "label_smoothing", "in [0, 1)", c.label_smoothing)
    need(0 <= c.optimizer.momentum < 1, "optimizer.momentum", "in [0, 1)", c.optimizer.momentum)
    need(0 < c.optimizer.decay_factor <= 1, "optimizer.decay_factor", "in (0, 1]", c.optimizer.decay_factor)
    need(
        c.optimizer.warmup_epochs <= c.epochs,
        "optimizer.warmup_epochs",
        "at most epochs",
        c.optimizer.warmup_epochs,
    )
    sizes = "batch_size accumulate epochs dense.epochs evaluate.batch_size evaluate.every_epochs "
    sizes += "checkpoint_every_epochs log_every_steps optimizer.decay_every"
    amounts = "seed holdout train_examples evaluate.examples crop_padding steps_per_dispatch optimizer.learning_rate "
    amounts += "attack.early_steps attack.early_epochs dense.learning_rate optimizer.weight_decay dense.weight_decay "
    amounts += "optimizer.warmup_epochs"
    for least, fields in ((1, sizes), (0, amounts)):
        for name in fields.split():
            value: Any = c
            for part in name.split("."):
                value = getattr(value, part)
            need(value >= least, name, f"at least {least}", value)
    need(
        c.holdout > 0 or c.select_on == "test",
        "holdout",
        "positive when select_on = 'holdout'",
        c.holdout,
        "The best checkpoint is chosen on held-out training images.",
    )
    need(c.dataset != "npz" or bool(c.data_path), "data_path", "an .npz file", "''", "Add --config.data_path=FILE.npz")
