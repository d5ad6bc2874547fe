"""Datasets as arrays, and the batches made from them on the device."""

from rst_jax.data.sources import Dataset, Split, load_dataset

__all__ = ["Dataset", "Split", "load_dataset"]
