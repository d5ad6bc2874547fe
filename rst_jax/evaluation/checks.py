"""Checks that change a card's verdict: what would make its robust accuracy mean less than it says.

The published AutoAttack warns; here a failed check makes the verdict `suspect` (the attacks may have been too weak) or
`invalid` (the figure is no robust accuracy). Only examples that stand can overstate robustness, so the checks of
attacks look at these: nothing is suspect about a network that was broken everywhere.
"""

import itertools
from collections.abc import Callable, Sequence

import numpy as np

from rst_jax.evaluation.cascade import Cascade
from rst_jax.evaluation.evidence import Evidence
from rst_jax.losses import margin
from rst_jax.records import Check
from rst_jax.threat import ThreatModel

_SAME = 1e-4  # difference of logits, over their norm
_SHARE = 0.1  # of the standing examples
_POINTS = 0.002  # of all examples; the published check of Square
_SATURATED = 16.6  # a margin from which a float32 softmax is exactly 1 at the label: -log(2^-24)
_PROBED = 64  # images
_SLACK, _ONE_SUM = 1e-5, 1e-3  # below 0 and above 1, over the largest output; between two sums, over the larger
_HALF = 0.01  # by how much types of 16 bits may miss a sum of 1
_UNLIKELY = 0.01  # a probability that some class of some image exceeds
_NUDGE = 0.25 / 255  # of the box, for every pixel: less than half a grey level of eight bits
_PASSES = 200  # as many as PGD-100 or one run of Auto-PGD looks forward and back

Logits = Callable[[np.ndarray], np.ndarray]


def check_function(raw: Logits, compiled: Logits, images: np.ndarray, threat: ThreatModel) -> list[Check]:
    """Checks of the classifier alone.

    Args:
      raw: the function itself, called as it is; compiled: as the attacks call it.
      images: float32 [n, ...]; the first 64 are looked at.
      threat: for its box.
    """
    x = images[:_PROBED]
    first = raw(x)
    half = max(len(x) // 2, 1)
    distance = {
        "the same images again": max((_apart(first, raw(x)) for _ in range(4)), default=0.0),
        "the compiled function": _apart(first, compiled(x)),
        "the images in another order": _apart(first[::-1], raw(np.ascontiguousarray(x[::-1]))),
        "half of the images alone": _apart(first[:half], raw(x[:half])),
    }
    apart = [name for name in distance if not distance[name] <= _SAME]
    worst = apart[0] if apart else max(distance, key=lambda name: distance[name])  # the first names the cause best
    shares, unit = _probabilities(first.astype(np.float64))
    total = first.astype(np.float64).sum(-1)
    nudge = _NUDGE * (threat.upper - threat.lower)
    noise = np.where(np.random.Philox(key=0).random_raw(x.size).reshape(x.shape) % 2, nudge, -nudge)
    inward = np.where((x + noise < threat.lower) | (x + noise > threat.upper), -noise, noise)
    unmoved = float((raw((x + inward).astype(np.float32)) == first).all(-1).mean())
    return [
        Check(
            "deterministic",
            distance[worst] <= _SAME,
            "invalid",
            f"logits of {worst} differ by {distance[worst]:.2g} of their norm (at most {_SAME:g})",
            "a random defence, a key that is closed over, or statistics of the batch; it needs attacks that average "
            "over its draws",
        ),
        Check(
            "logits",
            not (shares or unit),
            "invalid" if shares else "suspect",
            f"outputs lie in [{first.min():.3g}, {first.max():.3g}] and sum to {total.min():.3g} to {total.max():.3g}",
            ("these are" if shares else "these look like")
            + " probabilities, whose gradients vanish where the network is sure; give logits",
        ),
        Check(
            "continuous",
            unmoved <= 0.5,
            "suspect",
            f"{100 * unmoved:.0f} % of the probed images keep exactly their logits when every pixel moves by a quarter "
            "of a grey level (at most 50 %)",
            "inputs are quantised, and gradients through that mean little",
        ),
    ]


def _probabilities(outputs: np.ndarray) -> tuple[bool, bool]:
    """Whether outputs [n, classes] are shares of one whole, and whether they look like probabilities of each class.

    All is relative to their size, since logits may be tiny or lie far from 0. Shares are not below 0, and their sum is
    1 (or 100), or one for all images that they differ by much of, as shares that are sure of something do.
    """
    size, total = np.abs(outputs).max(), outputs.sum(-1)
    if outputs.min() < -_SLACK * size or not size:
        return False, False
    whole = any(np.abs(total - one).max() < _HALF * one for one in (1, 100))
    differ = np.ptp(outputs) > 0.1 * total.mean() / outputs.shape[-1]
    return bool(whole or (differ and np.ptp(total) < _ONE_SUM * total.max())), bool(_UNLIKELY < size <= 1 + _SLACK)


def check_cascade(cascade: Cascade, evidence: Evidence, logits: np.ndarray, labels: np.ndarray) -> list[Check]:
    """Checks of a cascade.

    Args:
      cascade, evidence: the cascade and what it found.
      logits: clean logits [n, classes]; labels: [n].
    """
    standing = evidence.standing
    some = bool(standing.any())
    claims = int(evidence.unverified.sum()) + int((evidence.attack >= 0).sum())
    checks = [
        _finite(evidence),
        Check(
            "verified",
            int(evidence.unverified.sum()) <= 0.01 * claims + 1,
            "suspect",
            f"{int(evidence.unverified.sum())} of {claims} claims did not hold when run again (at most 1 % and one)",
            "the network does not say the same again, or attacks end on the boundary",
        ),
    ]
    gradients = np.maximum(evidence.gradients, 1)
    if any(attack.needs_gradient for attack in cascade.attacks) and some:
        flat = float((evidence.flat / gradients > 0.5)[standing].mean())
        checks.append(
            Check(
                "gradients",
                flat <= _SHARE,
                "suspect",
                f"for {100 * flat:.0f} % of the standing examples most gradients were zero in every pixel (at most "
                f"{100 * _SHARE:.0f} %)",
                "something kills or hides them",
            )
        )
        sure = float((margin(logits, labels) > _SATURATED)[standing].mean())
        checks.append(
            Check(
                "not saturated",
                sure <= _SHARE,
                "suspect",
                f"{100 * sure:.0f} % of the standing examples have a softmax of exactly 1 in float32 (at most "
                f"{100 * _SHARE:.0f} %)",
                "cross-entropy of such logits has hardly a gradient",
            )
        )
    return [*checks, *_white_box_first(cascade, evidence)]


def _white_box_first(cascade: Cascade, evidence: Evidence) -> list[Check]:
    """Whether attacks without gradients find little after those with gradients, where a cascade has both."""
    blind = [k for k, attack in enumerate(cascade.attacks) if not attack.needs_gradient]
    if not blind or len(blind) == len(cascade.attacks):
        return []
    late = [k for k in blind if any(a.needs_gradient for a in cascade.attacks[:k])]
    gained, allowed = int(np.isin(evidence.attack, late).sum()), max(_POINTS * len(evidence.attack), 1)
    names = " and ".join(cascade.attacks[k].name for k in late)
    return [
        Check(
            "white box first",
            gained <= allowed,
            "suspect",
            f"{names} broke {gained} examples that stood against the attacks with gradients before it (at most "
            f"{allowed:.0f})",
            "these are too weak here",
        )
    ]


def check_suite(cascades: Sequence[Cascade], evidence: Sequence[Evidence]) -> list[Check]:
    """Checks of all cascades under one threat model: did any try hard, and do those without gradients do better?

    A cascade may be of the first examples only; the others count as not broken by it.
    """
    checks = []
    for threat in dict.fromkeys(cascade.threat for cascade in cascades):
        here = [(c, e) for c, e in zip(cascades, evidence, strict=True) if c.threat == threat]
        n = max(len(e.attack) for _, e in here)
        white, black, tried = np.zeros(n, bool), np.zeros(n, bool), 0.0
        for cascade, e in here:
            guided = [k for k, attack in enumerate(cascade.attacks) if attack.needs_gradient]
            white[: len(e.attack)] |= np.isin(e.attack, guided)
            if not guided:
                black[: len(e.attack)] |= e.attack >= 0
            if len(e.attack) == n:  # a cascade of the first examples says nothing of the others
                passes = (e.queries + e.gradients)[e.standing]
                tried = max(tried, float(np.median(passes)) if len(passes) else np.inf)
        checks.append(
            Check(
                f"effort, {threat.norm} {threat.eps:.4g}",
                tried >= _PASSES,
                "suspect",
                "in some cascade no example stands"
                if tried == np.inf
                else f"the strongest cascade spent {tried:.0f} passes on a standing example (at least {_PASSES})",
                "only weak attacks were run; take autoattack",
            )
        )
        if len({any(attack.needs_gradient for attack in cascade.attacks) for cascade, _ in here}) < 2:
            continue
        only, allowed = int((black & ~white).sum()), max(_POINTS * n, 1)
        checks.append(
            Check(
                f"black box no better, {threat.norm} {threat.eps:.4g}",
                only <= allowed,
                "suspect",
                f"attacks without gradients broke {only} of {n} examples that no attack with gradients did (at most "
                f"{allowed:.0f})",
                "gradients mislead here",
            )
        )
    return checks


def check_sweep(eps: Sequence[float], robust: Sequence[float], n: int, *evidence: Evidence) -> list[Check]:
    """Whether accuracy falls as eps grows, to 0 where any image can be reached, and whether all of it was numbers."""
    rises = max((b - a for a, b in itertools.pairwise(robust)), default=0.0)
    return [
        _finite(*evidence),
        Check(
            "falls to zero",
            robust[-1] == 0,
            "suspect",
            f"{100 * robust[-1]:.1f} % of {n} examples stand at eps {eps[-1]:g}, where every image can be reached "
            "(none should)",
            "the attack fails where it must succeed",
        ),
        Check(
            "falls with eps",
            rises <= max(0.01, 1.5 / n),
            "suspect",
            f"accuracy rises by {100 * rises:.1f} points from one eps to a larger one (at most 1)",
            "a larger ball holds the smaller one, so the attack misses what it could find",
        ),
    ]


def _finite(*evidence: Evidence) -> Check:
    strange = sum(int(e.not_finite.sum()) for e in evidence)
    return Check(
        "finite",
        not strange,
        "invalid",
        f"{strange} adversarial images or their logits were not finite",
        "an attack or the network computes NaN; what it would have found is unknown",
    )


def verdict(checks: Sequence[Check]) -> str:
    """`trustworthy`, `suspect: why` or `invalid: why`."""
    for effect in ("invalid", "suspect"):
        failed = [check for check in checks if not check.passed and check.effect == effect]
        if failed:
            return f"{effect}: " + "; ".join(f"{check.measured}: {check.means}" for check in failed)
    return "trustworthy"


def _apart(a: np.ndarray, b: np.ndarray) -> float:
    """The largest distance of two rows of logits, over the norm of the first around its mean.

    A hundredth of the norm around 0 is allowed for: logits that lie far from 0 are rounded more coarsely.
    """
    a = a.astype(np.float64)
    spread, size = (np.linalg.norm(each, axis=-1) for each in (a - a.mean(-1, keepdims=True), a))
    least = 1e-10 * size.max(initial=0.0) + 1e-300  # where a row is all 0
    gap = np.linalg.norm(a - b, axis=-1) / (spread + 0.01 * size + least)
    return float(gap.max(initial=0.0)) if np.isfinite(gap).all() else float("inf")
