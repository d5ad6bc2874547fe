"""Robust scratch tickets in JAX."""

from rst_jax.version import __version__

__all__ = ["__version__"]
