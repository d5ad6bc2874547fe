"""The configuration as frozen dataclasses: made once from a ConfigDict, checked once, read everywhere.

`configs/base.py` explains every field; here are their types, the same defaults, their ranges, and the checks across
them. A field says itself whether it may differ when a workdir is used again (`free`); the defaults stand for fields
that an older workdir does not know.
"""

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from rst_jax.threat import ThreatModel

Pattern = Literal["element", "row", "kernel", "filter"]
Stage = Literal["search", "dense", "evaluate", "transfer", "r2s", "cards", "report"]
_PIXELS = "Images lie in [0, 1]: write eight pixel levels as 8/255."
_RENAMED = {"task": "stages"}  # fields of earlier versions


def setting(
    default: Any,
    *,
    least: float | None = None,
    below: float | None = None,
    most: float | None = None,
    free: bool = False,
) -> Any:
    """A field with its default and range.

    Args:
      default: as in configs/base.py.
      least, most: the smallest and the largest value. below: what it stays below.
      free: it changes no finished ticket, so it may differ when a workdir is used again.
    """
    metadata = {"least": least, "below": below, "most": most, "free": free}
    return dataclasses.field(default=default, metadata=metadata)


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

    steps: int = setting(7, least=0)
    step_size: float = setting(2 / 255, least=0)
    random_start: bool = True
    restarts: int = setting(1, least=1)
    loss: Literal["ce", "margin"] = "ce"


@dataclasses.dataclass(frozen=True)
class Attack:
    """The inner maximisation of training: PGD, how the network behaves under it, and how it begins."""

    steps: int = setting(7, least=0)
    step_size: float = setting(2 / 255, least=0)
    random_start: bool = True
    batch_norm: Literal["train", "eval"] = "train"
    early_steps: int = setting(7, least=0)
    early_epochs: int = setting(0, least=0)

    def pgd(self, epoch: int) -> PGDSettings:
        """The attack of an epoch, counted from 0."""
        steps = self.early_steps if epoch < self.early_epochs else self.steps
        return PGDSettings(steps, self.step_size, self.random_start)


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """SGD and the schedule of its rate."""

    learning_rate: float = setting(0.1, least=0)
    momentum: float = setting(0.9, least=0, below=1)
    nesterov: bool = False
    weight_decay: float = setting(5e-4, least=0)
    schedule: Literal["piecewise", "multistep", "cosine", "linear"] = "piecewise"
    boundaries: tuple[int, ...] = (80, 120)
    decay_every: int = setting(30, least=1)
    decay_factor: float = setting(0.1, least=0, most=1)
    warmup_epochs: int = setting(0, least=0)
    unit: Literal["epoch", "step"] = "epoch"


@dataclasses.dataclass(frozen=True)
class Dense:
    """What differs when all weights are trained."""

    train: bool = True
    learning_rate: float = setting(0.1, least=0)
    weight_decay: float = setting(5e-4, least=0)
    epochs: int = setting(160, least=1)


@dataclasses.dataclass(frozen=True)
class Evaluate:
    """The evaluation attack (PGD), how often the held-out images are attacked, and the card at the end."""

    steps: int = setting(20, least=0)
    step_size: float = setting(2 / 255, least=0)
    batch_size: int = setting(250, least=1)
    examples: int = setting(0, least=0)
    every_epochs: int = setting(5, least=1)
    card: Literal["pgd", "autoattack", "full"] = setting("pgd", free=True)

    @property
    def pgd(self) -> PGDSettings:
        """The paper's measure: one uniform start, an example rests once it is misclassified."""
        return PGDSettings(self.steps, self.step_size)


@dataclasses.dataclass(frozen=True)
class Config:
    """A whole run. Fields as in `configs/base.py`."""

    stages: tuple[Stage, ...] = setting(typing.get_args(Stage), free=True)
    seed: int = setting(0, least=0, below=2**32)
    model: str = "resnet18"
    remaining_ratios: tuple[float, ...] = setting((0.03, 0.05, 0.07, 0.1, 0.15, 0.2, 0.4, 0.6), free=True)
    pattern: Pattern = "element"
    weight_init: str = "signed_kaiming_constant"
    scale_fan: bool = False
    dataset: str = "cifar10"
    data_dir: str = setting("~/tensorflow_datasets", free=True)
    data_path: str = setting("", free=True)
    holdout: int = setting(5200, least=0)
    train_examples: int = setting(0, least=0)
    select_on: Literal["holdout", "test"] = "holdout"
    crop_padding: int = setting(4, least=0)
    flip: bool = True
    threat: ThreatModel = ThreatModel(8 / 255)
    attack: Attack = Attack()
    batch_size: int = setting(256, least=1)
    accumulate: int = setting(1, least=1)
    epochs: int = setting(160, least=1)
    label_smoothing: float = setting(0.0, least=0, below=1)
    optimizer: Optimizer = Optimizer()
    dense: Dense = Dense()
    evaluate: Evaluate = Evaluate()
    compute_dtype: Literal["auto", "float32", "bfloat16", "float64"] = "auto"
    bn_sync: bool = False
    remat: bool = setting(False, free=True)
    unroll: Literal["auto", "scan", "unroll"] = setting("auto", free=True)
    steps_per_dispatch: int = setting(0, least=0, free=True)
    compilation_cache: str = setting("~/.cache/rst_jax", free=True)
    checkpoint_every_epochs: int = setting(1, least=1, free=True)
    log_every_steps: int = setting(50, least=1, free=True)

    def __post_init__(self) -> None:
        _check_ranges(self)
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
    return _build(Config, fields, "")


def near(word: str, known: Iterable[str], instead: str = "") -> str:
    """The end of a sentence about a word that is not known: the nearest known one, or `instead`."""
    found = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"did you mean {found[0]!r}?" if found else instead


def unknown_field(name: str) -> str:
    """The sentence for a field that does not exist."""
    known, last = field_names(), name.rsplit(".")[-1]
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


def _build(cls: Any, fields: Mapping[str, Any], prefix: str) -> Any:
    if not isinstance(fields, Mapping) and not hasattr(fields, "items"):
        raise ValueError(f"config: {prefix[:-1]!r} is a section; expected fields in it, got {fields!r}.")
    known = {field.name: field.type for field in dataclasses.fields(cls)}
    values = {}
    for name in fields:
        if name not in known:
            raise ValueError(unknown_field(prefix + name))
        kind, value = known[name], fields[name]
        is_section = dataclasses.is_dataclass(kind)
        values[name] = _build(kind, value, prefix + name + ".") if is_section else _cast(value, kind, prefix + name)
    try:
        return cls(**values)
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
    kind = float if float in typing.get_args(kind) else kind  # a threat model's radius, which programs trace
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        expected = kind.__name__ if isinstance(kind, (type, types.GenericAlias)) else str(kind)
        raise ValueError(f"config: {name} must be a {expected}; got {value!r}.")
    return value


def _need(ok: bool, name: str, expected: str, got: Any, fix: str = "") -> None:
    if not ok:
        raise ValueError(f"config: {name} must be {expected}; got {got}.{' ' + fix if fix else ''}")


def _check_ranges(c: Config) -> None:
    for name, field in _fields().items():
        value: Any = c
        for part in name.split("."):
            value = getattr(value, part)
        limits = field.metadata
        if (least := limits.get("least")) is not None:
            _need(value >= least, name, f"at least {least}", value)
        if (below := limits.get("below")) is not None:
            told = "below 2**32" if below == 2**32 else f"below {below}"
            _need(value < below, name, told, value)
        if (most := limits.get("most")) is not None:
            _need(value <= most, name, f"at most {most}", value)


def _check_together(c: Config) -> None:
    """What no field can say of itself alone."""
    _need(len(c.remaining_ratios) > 0, "remaining_ratios", "at least one fraction", "none")
    kept = "They are the fractions of weights kept."
    for ratio in c.remaining_ratios:
        _need(0 < ratio <= 1, "remaining_ratios", "fractions in (0, 1]", ratio, kept)
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
    _need(c.optimizer.decay_factor > 0, "optimizer.decay_factor", "in (0, 1]", c.optimizer.decay_factor)
    _need(c.optimizer.warmup_epochs <= c.epochs, "optimizer.warmup_epochs", "at most epochs", c.optimizer.warmup_epochs)
    held_out = "The best checkpoint is chosen on held-out training images."
    _need(c.holdout > 0 or c.select_on == "test", "holdout", "positive when select_on = 'holdout'", c.holdout, held_out)
    _need(c.dataset != "npz" or bool(c.data_path), "data_path", "an .npz file", "''", "Add --config.data_path=FILE.npz")
