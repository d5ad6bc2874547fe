"""Attacks on a `logits_fn` from images [N, H, W, C] in [0, 1] to logits [N, classes].

`pgd` is the loop inside training; the others are those of an evaluation, each a start and a step (`attack.py`).
"""

from rst_jax.attacks.apgd import APGD
from rst_jax.attacks.attack import Attack, Found, Problem
from rst_jax.attacks.autoattack import autoattack
from rst_jax.attacks.bandits import Bandits
from rst_jax.attacks.cw import CWL2
from rst_jax.attacks.fab import FAB
from rst_jax.attacks.mim import MIM
from rst_jax.attacks.noise import Noise
from rst_jax.attacks.pgd import PGD, pgd
from rst_jax.attacks.square import Square

__all__ = [
    "APGD",
    "CWL2",
    "FAB",
    "MIM",
    "PGD",
    "Attack",
    "Bandits",
    "Found",
    "Noise",
    "Problem",
    "Square",
    "autoattack",
    "pgd",
]
