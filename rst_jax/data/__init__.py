"""Datasets as arrays, in memory or decoded when asked for, and the batches made from them on the device."""

from rst_jax.data.sources import Dataset, Split, SplitImages, load_dataset, load_test
from rst_jax.data.stream import EncodedImages, prefetched

__all__ = ["Dataset", "EncodedImages", "Split", "SplitImages", "load_dataset", "load_test", "prefetched"]
