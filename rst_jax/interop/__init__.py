"""Networks from and for other libraries."""

from rst_jax.interop.official import from_official

__all__ = ["from_official"]
