"""Attacks: each takes a `logits_fn` from images [N, H, W, C] in [0, 1] to logits [N, classes]."""

from rst_jax.attacks.apgd import APGD
from rst_jax.attacks.attack import Attack, Found, Problem, run
from rst_jax.attacks.fab import FAB
from rst_jax.attacks.pgd import PGD, pgd
from rst_jax.attacks.square import Square

__all__ = ["APGD", "FAB", "PGD", "Attack", "Found", "Problem", "Square", "pgd", "run"]
