"""Attacks: each takes a `logits_fn` from images [N, H, W, C] in [0, 1] to logits [N, classes]."""

from rst_jax.attacks.pgd import pgd

__all__ = ["pgd"]
