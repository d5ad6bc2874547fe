"""The rows that a card may have, by name."""

import dataclasses
import difflib
from collections.abc import Callable, Sequence

from rst_jax.attacks import APGD, CWL2, FAB, MIM, PGD, Attack, Bandits, Noise, Square, autoattack
from rst_jax.evaluation.cascade import Row
from rst_jax.threat import ThreatModel

_SWEPT = 250  # examples of the sweep over eps, and of CW-L2
ATTACKS: dict[str, Callable[[bool], tuple[Attack, ...]]] = {
    "autoattack": autoattack,
    "fgsm": lambda _: (PGD("FGSM", 1, 1.0, random_start=False),),
    "fgsm-rs": lambda _: (PGD("FGSM-RS", 1, 1.25),),
    "pgd-20": lambda _: (PGD("PGD-20", 20, 0.25),),
    "pgd-100x10": lambda _: (PGD("PGD-100", 100, 0.025, rounds=10),),
    "cw-linf": lambda _: (PGD("CW-Linf", 100, 0.025, loss="margin"),),
    "mim": lambda _: (MIM(),),
    "apgd-ce": lambda faithful: (APGD("ce", faithful=faithful),),
    "apgd-dlr": lambda faithful: (APGD("dlr", faithful=faithful),),
    "apgd-t": lambda faithful: (APGD("dlr-targeted", rounds=9, faithful=faithful),),
    "fab": lambda _: (FAB(targeted=False, rounds=1),),
    "fab-t": lambda _: (FAB(),),
    "square": lambda faithful: (Square(faithful=faithful),),
    "cw-l2": lambda _: (CWL2(),),
    "bandits": lambda _: (Bandits(),),
    "noise": lambda _: (Noise(),),
}
FULL = ("fgsm", "fgsm-rs", "pgd-20", "pgd-100x10", "cw-linf", "mim", "autoattack", "autoattack-l2", "cw-l2", "square")


def make_rows(
    attacks: str | Sequence[str], threat: ThreatModel, eps_l2: float, faithful: bool = False, obstacle: str = ""
) -> list[Row]:
    """The rows of a card, the last of which is noise.

    Args:
      attacks: names of `ATTACKS`, "autoattack-l2", or "full".
      threat: of all rows but those that say L2.
      eps_l2: of these, unless the threat model is L2 itself.
      faithful: keep the published attacks' quirks.
      obstacle: why attacks with gradients cannot be run, if they cannot.

    Raises:
      ValueError: an unknown name (the nearest one is named), or an attack that cannot be run.
    """
    rows = []
    for name in _named([attacks] if isinstance(attacks, str) else attacks, threat):
        l2 = name in ("autoattack-l2", "cw-l2") and threat.norm != "l2"
        cascade = ATTACKS[name.removesuffix("-l2") if name == "autoattack-l2" else name](faithful)
        if obstacle and any(attack.needs_gradient for attack in cascade):
            raise ValueError(
                f"attack {name!r} needs gradients, and JAX cannot differentiate this logits_fn ({obstacle}); take "
                "square or bandits."
            )
        where = dataclasses.replace(threat, norm="l2", eps=eps_l2) if l2 else threat
        titles = {"autoattack": "AutoAttack", "autoattack-l2": "AutoAttack L2", "pgd-100x10": "PGD-100x10"}
        rows.append(Row(titles.get(name, cascade[0].name), cascade, where, _SWEPT if name == "cw-l2" else 0))
    return rows


def _named(names: Sequence[str], threat: ThreatModel) -> list[str]:
    """The rows asked for, each once, and last of all noise, which every card has."""
    known, found = [*ATTACKS, "autoattack-l2", "full"], list[str]()
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(known)}."
            raise ValueError(f"there is no attack {name!r}; {hint}")
        found += FULL if name == "full" else [name]
    if threat.norm == "l2":
        if "cw-linf" in names:
            raise ValueError("cw-linf is an attack under Linf; under L2 take cw-l2.")
        found = ["autoattack" if name == "autoattack-l2" else name for name in found if name != "cw-linf"]
    return [name for name in dict.fromkeys(found) if name != "noise"] + ["noise"]


def sweep_rows(threat: ThreatModel, pixels: int, obstacle: str = "") -> list[Row]:
    """From a quarter of eps to where every image can be reached; `obstacle` as in `make_rows`."""
    width = threat.upper - threat.lower
    whole = width if threat.norm == "linf" else width * pixels**0.5
    radii = sorted({float(min(threat.eps * k, whole)) for k in (0.25, 0.5, 1, 1.5, 2, 4) if threat.eps} | {whole})
    attack: Attack = Square(steps=1000) if obstacle else APGD("ce")
    return [Row(f"eps {r:.4g}", (attack,), dataclasses.replace(threat, eps=r), _SWEPT) for r in radii]


def described(attack: Attack, classes: int) -> str:
    """An attack with all its settings where there are so many classes, the passes and rounds first."""
    settings = {field.name: getattr(attack, field.name) for field in dataclasses.fields(attack)}  # type: ignore[arg-type]
    first = {"passes": attack.passes, "rounds": attack.rounds_of(classes)}
    rest = {name: value for name, value in settings.items() if name not in ("title", *first)}
    return f"{attack.name}(" + ", ".join(f"{name}={value}" for name, value in {**first, **rest}.items()) + ")"
