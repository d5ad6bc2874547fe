"""AutoAttack, the standard version (Croce and Hein, 2020): four attacks, each on what the ones before left standing."""

from rst_jax.attacks.apgd import APGD
from rst_jax.attacks.attack import Attack
from rst_jax.attacks.fab import FAB
from rst_jax.attacks.square import Square


def autoattack(faithful: bool = False) -> tuple[Attack, ...]:
    """APGD-CE, APGD-T and FAB-T against nine targets each, Square with 5,000 queries.

    Args:
      faithful: as published, with the quirks of `APGD` and `Square`, for comparison. By default, examples that came
        near to breaking are also attacked from many more starts.
    """
    published = (
        APGD("ce", faithful=faithful),
        APGD("dlr-targeted", rounds=9, faithful=faithful),
        FAB(),
        Square(faithful=faithful),
    )
    return published if faithful else (*published, APGD("ce", rounds=30, near=0.1))
