"""The cascades that a card may have, by name. A new attack is a file in `attacks/` and a line in `ATTACKS`."""

import dataclasses
import importlib
import re
from collections.abc import Callable, Iterable, Sequence

from rst_jax.attacks import APGD, PGD, Attack, Bandits, Square, autoattack
from rst_jax.config import PGDSettings, near
from rst_jax.evaluation.cascade import Cascade
from rst_jax.threat import ThreatModel

_SWEPT = 250  # examples of the sweep over eps, and of CW-L2
_Made = Callable[[ThreatModel, bool], tuple[Attack, ...]]


def _of(place: str, **settings: object) -> _Made:
    """The attack `file.Class` of `rst_jax/attacks/`, looked up when it is asked for."""
    module, _, name = place.partition(".")
    return lambda *_: (getattr(importlib.import_module(f"rst_jax.attacks.{module}"), name)(**settings),)


def _pgd(title: str, threat: ThreatModel, steps: int, of_eps: float, **settings: object) -> tuple[Attack, ...]:
    """PGD whose step is so much of eps."""
    return (PGD(title, PGDSettings(steps, of_eps * float(threat.eps), **settings)),)  # type: ignore[arg-type]


# From the threat model, and whether to be faithful to the published attacks' quirks.
ATTACKS: dict[str, _Made] = {
    "autoattack": lambda _, faithful: autoattack(faithful),
    "fgsm": lambda threat, _: _pgd("FGSM", threat, 1, 1.0, random_start=False),
    "fgsm-rs": lambda threat, _: _pgd("FGSM-RS", threat, 1, 1.25),
    "pgd-20": lambda threat, _: _pgd("PGD-20 eps/4", threat, 20, 0.25),
    "pgd-100x10": lambda threat, _: _pgd("PGD-100 eps/40", threat, 100, 0.025, restarts=10),
    "cw-linf": lambda threat, _: _pgd("CW-Linf", threat, 100, 0.025, loss="margin"),
    "mim": _of("mim.MIM"),
    "apgd-ce": lambda _, faithful: (APGD("ce", faithful=faithful),),
    "apgd-dlr": lambda _, faithful: (APGD("dlr", faithful=faithful),),
    "apgd-t": lambda _, faithful: (APGD("dlr-targeted", rounds=9, faithful=faithful),),
    "fab": _of("fab.FAB", targeted=False, rounds=1),
    "fab-t": _of("fab.FAB"),
    "square": lambda _, faithful: (Square(faithful=faithful),),
    "cw-l2": _of("cw.CWL2"),
    "bandits": lambda threat, _: (Bandits(step_size=0.1 * float(threat.eps)),),
    "noise": _of("noise.Noise"),
}
FULL = ("fgsm", "fgsm-rs", "pgd-20", "pgd-100x10", "cw-linf", "mim", "autoattack", "autoattack-l2", "cw-l2", "square")
_TITLES = {"autoattack": "AutoAttack", "autoattack-l2": "AutoAttack L2", "pgd-100x10": "PGD-100x10"}


@dataclasses.dataclass(frozen=True)
class Suite:
    """The cascades of a card.

    Attributes:
      cascades: in order; noise is the last.
      sweep: at growing eps, to where every image can be reached.
      faithful: to the published attacks' quirks.
    """

    cascades: tuple[Cascade, ...]
    sweep: tuple[Cascade, ...]
    faithful: bool = False

    @property
    def mode(self) -> str:
        """As on the card."""
        return "faithful" if self.faithful else "default"


def make_suite(
    attacks: str | Attack | Sequence[str | Attack],
    threat: ThreatModel,
    image_shape: tuple[int, ...],
    *,
    eps_l2: float = 0.5,
    faithful: bool = False,
    obstacle: str = "",
) -> Suite:
    """The cascades by their names.

    Args:
      attacks: names of `ATTACKS`, "autoattack-l2", or "full", several with commas between or in a sequence; or attacks
        themselves.
      threat: of all cascades but those that say L2.
      image_shape: [H, W, C]; how far the sweep must go under L2 follows from it.
      eps_l2: of the cascades that say L2, unless the threat model is L2 itself.
      faithful: keep the published attacks' quirks.
      obstacle: why attacks with gradients cannot be run, if they cannot.

    Raises:
      ValueError: an unknown name (the nearest one is named), an attack that cannot be run, two of one name, or none.
    """
    cascades = list[Cascade]()
    for asked in _named(_split(attacks), threat):
        cascade = _own(asked, threat) if isinstance(asked, Attack) else _known(asked, threat, eps_l2, faithful)
        if obstacle and any(attack.needs_gradient for attack in cascade.attacks):
            raise ValueError(
                f"attack {cascade.folder!r} needs gradients, and JAX cannot differentiate this logits_fn ({obstacle}); "
                "take square or bandits."
            )
        cascades.append(cascade)
    if twice := sorted({c.name for c in cascades if sum(c.name == other.name for other in cascades) > 1}):
        raise ValueError(f"two different attacks are called {twice[0]!r}; a figure's name says what differs.")
    return Suite(tuple(cascades), _sweep(threat, image_shape, obstacle), faithful)


def _known(name: str, threat: ThreatModel, eps_l2: float, faithful: bool) -> Cascade:
    l2 = name in ("autoattack-l2", "cw-l2") and threat.norm != "l2"
    where = dataclasses.replace(threat, norm="l2", eps=eps_l2) if l2 else threat
    attacks = ATTACKS["autoattack" if name == "autoattack-l2" else name](where, faithful)
    return Cascade(_TITLES.get(name, attacks[0].name), attacks, where, _SWEPT if name == "cw-l2" else 0, name)


def _own(attack: Attack, threat: ThreatModel) -> Cascade:
    """Of an attack that no table names."""
    return Cascade(attack.name, (attack,), threat, folder=re.sub(r"[^\w.+-]+", "-", attack.name.lower()))


def _split(attacks: str | Attack | Sequence[str | Attack]) -> list[str | Attack]:
    """Attacks and single names."""
    if isinstance(attacks, str):
        return [name.strip() for name in attacks.split(",")]
    if isinstance(attacks, Attack):
        return [attacks]
    if not isinstance(attacks, Iterable):
        raise ValueError(f"attacks must be names or attacks; got {attacks!r}.")
    found = [each for some in attacks for each in (_split(some) if isinstance(some, str) else [some])]
    if not found:
        raise ValueError("attacks must name at least one; take autoattack.")
    return found


def _named(names: Sequence[str | Attack], threat: ThreatModel) -> list[str | Attack]:
    """The cascades asked for, each once, and last of all noise, which every card has."""
    known, found = [*ATTACKS, "autoattack-l2", "full"], list[str | Attack]()
    for name in names:
        if not isinstance(name, Attack) and name not in known:
            hint = near(str(name), known, f"there are {', '.join(known)}.")
            made = " Of an attack's class give one made, as in PGD()." if isinstance(name, type) else ""
            raise ValueError(f"there is no attack {name!r}; {hint}{made}")
        found += FULL if name == "full" else [name]
    if threat.norm == "l2":
        if "cw-linf" in names:
            raise ValueError("cw-linf is an attack under Linf; under L2 take cw-l2.")
        found = ["autoattack" if name == "autoattack-l2" else name for name in found if name != "cw-linf"]
    return [name for name in dict.fromkeys(found) if name != "noise"] + ["noise"]


def _sweep(threat: ThreatModel, image_shape: tuple[int, ...], obstacle: str) -> tuple[Cascade, ...]:
    """From a quarter of eps to where every image can be reached."""
    whole = threat.reach(image_shape)
    radii = sorted({float(min(threat.eps * k, whole)) for k in (0.25, 0.5, 1, 1.5, 2, 4) if threat.eps} | {whole})
    attack: Attack = Square(steps=1000) if obstacle else APGD("ce")
    where = [dataclasses.replace(threat, eps=r) for r in radii]
    return tuple(
        Cascade(f"eps {r:.4g}", (attack,), there, _SWEPT, f"sweep-{float(there.eps)!r}")
        for r, there in zip(radii, where, strict=True)
    )


def described(attack: Attack, classes: int) -> str:
    """An attack with all its settings where there are so many classes, the passes and rounds first."""
    settings = {field.name: getattr(attack, field.name) for field in dataclasses.fields(attack)}  # type: ignore[arg-type]
    if isinstance(inner := settings.pop("settings", None), PGDSettings):
        settings |= vars(inner)
    first = {"passes": attack.passes, "rounds": attack.rounds_of(classes)}
    rest = {name: value for name, value in settings.items() if name not in ("title", "restarts", *first)}
    return f"{attack.name}(" + ", ".join(f"{name}={value}" for name, value in {**first, **rest}.items()) + ")"
