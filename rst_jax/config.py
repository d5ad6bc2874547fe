"""The configuration as frozen dataclasses: made once from a ConfigDict, checked once, read everywhere.

`configs/base.py` explains every field; here are their types, the same defaults, and the checks across
them. A field says itself whether it may differ when a workdir is used again (`free`); the defaults stand for fields
that an older workdir does not know.
"""

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from rst_jax import ranges
from rst_jax.ranges import Count, Length, Pixels, Positive, Rate, Seed, ShareAboveZero, ShareBelowOne, Steps
from rst_jax.threat import ThreatModel

Pattern = Literal["element", "row", "kernel", "filter"]
Stage = Literal["search", "dense", "evaluate", "transfer", "r2s", "cards", "report"]
_PIXELS = "Images lie in [0, 1]: write eight pixel levels as 8/255."
_RENAMED = {"task": "stages"}  # fields of earlier versions


def free(default: Any) -> Any:
    """A field that changes no finished ticket, so it may differ when a workdir is used again."""
    return dataclasses.field(default=default, metadata={"free": True})


@dataclasses.dataclass(frozen=True)
class PGDSettings:
    """One attack by projected gradient descent, in training, validation and cards alike.

    FGSM is one step of eps without a random start, FGSM-RS one step of 1.25 eps with one; CW-Linf is PGD on the margin.

    Attributes:
      steps: gradient steps; 0 is no attack.
      step_size: in image units (of [0, 1]), whatever eps.
      random_start: uniform in the threat model's ball.
      restarts: independent starts.
      loss: what is increased: cross-entropy ("ce") or minus the margin ("margin").
    """

    steps: Steps = 7
    step_size: Length = 2 / 255
    random_start: bool = True
    restarts: Positive = 1
    loss: Literal["ce", "margin"] = "ce"

    def __post_init__(self) -> None:
        ranges.check(self)


@dataclasses.dataclass(frozen=True)
class Attack:
    """The inner maximisation of training: PGD, how the network behaves under it, and how it begins."""

    steps: Steps = 7
    step_size: Length = 2 / 255
    random_start: bool = True
    batch_norm: Literal["train", "eval"] = "train"
    early_steps: Steps = 7
    early_epochs: Count = 0

    def pgd(self, epoch: int) -> PGDSettings:
        """The attack of an epoch, counted from 0."""
        steps = self.early_steps if epoch < self.early_epochs else self.steps
        return PGDSettings(steps, self.step_size, self.random_start)


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """SGD and the schedule of its rate."""

    learning_rate: Rate = 0.1
    momentum: ShareBelowOne = 0.9
    nesterov: bool = False
    weight_decay: Rate = 5e-4
    schedule: Literal["piecewise", "multistep", "cosine", "linear"] = "piecewise"
    boundaries: tuple[Count, ...] = (80, 120)
    decay_every: Positive = 30
    decay_factor: ShareAboveZero = 0.1
    warmup_epochs: Count = 0
    unit: Literal["epoch", "step"] = "epoch"


@dataclasses.dataclass(frozen=True)
class Dense:
    """What differs when all weights are trained."""

    train: bool = True
    learning_rate: Rate = 0.1
    weight_decay: Rate = 5e-4
    epochs: Positive = 160


@dataclasses.dataclass(frozen=True)
class Evaluate:
    """The evaluation attack (PGD), how often the held-out images are attacked, and the card at the end."""

    steps: Steps = 20
    step_size: Length = 2 / 255
    batch_size: Positive = 250
    examples: Count = 0
    every_epochs: Positive = 5
    card: Literal["pgd", "autoattack", "full"] = free("pgd")

    @property
    def pgd(self) -> PGDSettings:
        """The paper's measure: one uniform start, an example rests once it is misclassified."""
        return PGDSettings(self.steps, self.step_size)


@dataclasses.dataclass(frozen=True)
class Config:
    """A whole run. Fields as in `configs/base.py`."""

    stages: tuple[Stage, ...] = free(typing.get_args(Stage))
    seed: Seed = 0
    model: str = "resnet18"
    remaining_ratios: tuple[ShareAboveZero, ...] = free((0.03, 0.05, 0.07, 0.1, 0.15, 0.2, 0.4, 0.6))
    pattern: Pattern = "element"
    weight_init: str = "signed_kaiming_constant"
    scale_fan: bool = False
    dataset: str = "cifar10"
    data_dir: str = free("~/tensorflow_datasets")
    data_path: str = free("")
    holdout: Count = 5200
    train_examples: Count = 0
    select_on: Literal["holdout", "test"] = "holdout"
    crop_padding: Pixels = 4
    flip: bool = True
    threat: ThreatModel = ThreatModel(8 / 255)
    attack: Attack = Attack()
    batch_size: Positive = 256
    accumulate: Positive = 1
    epochs: Positive = 160
    label_smoothing: ShareBelowOne = 0.0
    optimizer: Optimizer = Optimizer()
    dense: Dense = Dense()
    evaluate: Evaluate = Evaluate()
    compute_dtype: Literal["auto", "float32", "bfloat16", "float64"] = "auto"
    bn_sync: bool = False
    remat: bool = free(False)
    unroll: Literal["auto", "scan", "unroll"] = free("auto")
    steps_per_dispatch: Count = free(0)
    compilation_cache: str = free("~/.cache/rst_jax")
    checkpoint_every_epochs: Positive = free(1)
    log_every_steps: Positive = free(50)

    def __post_init__(self) -> None:
        try:
            ranges.check(self)
        except ValueError as error:
            raise ValueError(f"config: {error}") from None
        _check_together(self)

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists and numbers, for JSON."""
        return dataclasses.asdict(self)

    def may_change(self, name: str) -> bool:
        """Whether the (dotted) field may differ when a workdir is used again."""
        if name == "remaining_ratios":
            return not self.scale_fan
        return bool(_fields()[name].metadata.get("free"))


def from_dict(fields: Mapping[str, Any]) -> Config:
    """A ConfigDict (or a dict of dicts) as a checked Config; fields that are missing take their defaults.

    Raises:
      ValueError: an unknown field (the nearest known one is named), a wrong type, or a value
        outside its range; the message says what was expected, what was got and what to do.
    """
    return _build(Config(), fields, "")


def near(word: str, known: Iterable[str], instead: str = "") -> str:
    """The end of a sentence about a word that is not known: the nearest known one, or `instead`."""
    found = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"did you mean {found[0]!r}?" if found else instead


def unknown_field(name: str) -> str:
    """The sentence for a field that does not exist."""
    known, last = field_names(), str(name).rsplit(".")[-1]
    by_last = {k.rsplit(".")[-1]: k for k in reversed(known)}
    closest = difflib.get_close_matches(last, by_last, n=1)
    found = _RENAMED.get(name) or (by_last[closest[0]] if closest else "")
    hint = f"did you mean {found!r}?" if found else "configs/base.py lists all of them."
    return f"config: there is no field {name!r}; {hint}"


def _fields(cls: type = Config, prefix: str = "") -> dict[str, dataclasses.Field]:
    """All fields by their dotted names, sections included."""
    found: dict[str, dataclasses.Field] = {}
    for field in dataclasses.fields(cls):
        found[prefix + field.name] = field
        if dataclasses.is_dataclass(field.type):
            found |= _fields(typing.cast(type, field.type), prefix + field.name + ".")
    return found


def field_names() -> list[str]:
    """All dotted field names, sections included."""
    return list(_fields())


def _build(default: Any, fields: Mapping[str, Any], prefix: str) -> Any:
    """A section (or all of them) with some fields laid over its defaults."""
    if not isinstance(fields, Mapping) and not hasattr(fields, "items"):
        raise ValueError(f"config: {prefix[:-1]!r} is a section; expected fields in it, got {fields!r}.")
    known = {field.name: field.type for field in dataclasses.fields(default)}
    values = {}
    for name in fields:
        if name not in known:
            raise ValueError(unknown_field(f"{prefix}{name}"))
        kind, value = known[name], fields[name]
        is_section = dataclasses.is_dataclass(kind)
        inside = getattr(default, name)
        values[name] = _build(inside, value, f"{prefix}{name}.") if is_section else _cast(value, kind, prefix + name)
    try:
        return dataclasses.replace(default, **values)
    except ValueError as error:  # a section of another room
        raise error if not prefix else ValueError(f"config: {prefix}{error}") from error


def _cast(value: Any, kind: Any, name: str) -> Any:
    origin = typing.get_origin(kind)
    if origin is Literal:
        choices = typing.get_args(kind)
        if value not in choices:
            hint = near(str(value), choices)
            raise ValueError(
                f"config: {name} must be one of {', '.join(choices)}; got {value!r}.{' ' * bool(hint)}{hint}"
            )
        return value
    if origin is tuple:
        item = typing.get_args(kind)[0]
        values = value if isinstance(value, (tuple, list)) else (value,)
        return tuple(_cast(v, item, name) for v in values)
    kind, _ = ranges.taken_apart(kind)
    kind = float if float in typing.get_args(kind) else kind  # a threat model's radius, which programs trace
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value) if abs(value) < 2**1000 else math.inf
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        expected = kind.__name__ if isinstance(kind, (type, types.GenericAlias)) else str(kind)
        raise ValueError(f"config: {name} must be a {expected}; got {value!r}.")
    return value


def _need(ok: bool, name: str, expected: str, got: Any, fix: str = "") -> None:
    if not ok:
        raise ValueError(f"config: {name} must be {expected}; got {got}.{' ' + fix if fix else ''}")


def _check_together(c: Config) -> None:
    """What no field can say of itself alone."""
    _need(len(c.remaining_ratios) > 0, "remaining_ratios", "at least one fraction", "none")
    names = {f"{ratio:g}" for ratio in c.remaining_ratios}
    _need(len(names) == len(c.remaining_ratios), "remaining_ratios", "distinct to six digits", c.remaining_ratios)
    several = "False when several ratios share one set of weights"
    _need(not c.scale_fan or len(c.remaining_ratios) == 1, "scale_fan", several, True, "Draw one ratio a run.")
    known = typing.get_args(Stage)
    told = f"some of {', '.join(known)}, in this order"
    _need(list(c.stages) == [stage for stage in known if stage in c.stages] != [], "stages", told, c.stages)
    _need((c.threat.lower, c.threat.upper) == (0, 1), "threat.lower and upper", "0 and 1, as images are", c.threat)
    if c.threat.norm == "linf":
        sizes = {"threat.eps": float(c.threat.eps), "attack.step_size": c.attack.step_size}
        for name, value in {**sizes, "evaluate.step_size": c.evaluate.step_size}.items():
            _need(0 <= value <= 1, name, "in [0, 1]", value, _PIXELS)
    _need(c.optimizer.warmup_epochs <= c.epochs, "optimizer.warmup_epochs", "at most epochs", c.optimizer.warmup_epochs)
    held_out = "The best checkpoint is chosen on held-out training images."
    _need(c.holdout > 0 or c.select_on == "test", "holdout", "positive when select_on = 'holdout'", c.holdout, held_out)
    _need(c.dataset != "npz" or bool(c.data_path), "data_path", "an .npz file", "''", "Add --config.data_path=FILE.npz")
