"""`python -m rst_jax` is `python -m rst_jax.main`."""

from rst_jax.main import main

main()
