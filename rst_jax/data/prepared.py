"""TFDS data sets that lie prepared on the disk, read without TensorFlow; what may be wrong with one, and what to do."""

import re
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rst_jax.config import near
from rst_jax.data.arrays import Examples
from rst_jax.data.catalog import CATALOG
from rst_jax.data.given import check_shape, whole_labels
from rst_jax.data.stream import EncodedImages, Record

_NAME = re.compile(r"[A-Za-z]\w{0,99}(/[\w.+-]{1,99})?(:\d+\.\d+\.\d+)?")  # name, configuration and version
_AT_ONCE = 1000  # records


class Prepared:
    """A data set of images and labels that TFDS has prepared in array_record format (or converted to it).

    Args:
      name: TFDS's, for instance "cifar10" or "cifar10_corrupted/fog_3".
      data_dir: where TFDS keeps its data sets.

    Attributes:
      folder: of its files.
      class_names: of its labels, in order.

    Raises:
      ValueError: it is not there, or not as it must be; the message says what to do.
    """

    def __init__(self, name: str, data_dir: Path):
        self.name, self.data_dir = name, data_dir
        if not _NAME.fullmatch(name):
            raise ValueError(
                f"config: dataset must be digits, npz or a TFDS name such as cifar10 or cifar10_corrupted/fog_3; got "
                f"{name!r}."
            )
        if not (data_dir / name.split(":")[0]).is_dir():
            raise ValueError(self._absent())
        import tensorflow_datasets as tfds
        from absl import logging

        logging.set_verbosity(logging.ERROR)  # TFDS advises OpenCV at every start
        try:
            self._builder = tfds.builder(name, data_dir=data_dir)
            self.folder, there = Path(self._builder.data_dir), self._builder.info.splits
            formats = {form.value for form in self._builder.info.available_file_formats()}
        except Exception as error:  # TFDS raises its own kinds for each of a missing file, version and format
            raise ValueError(
                f"{data_dir / name}: TFDS cannot read what lies there ({_told(error)}). Delete that folder and prepare "
                f"it with:\n  {self._command()}"
            ) from error
        if not there:
            raise ValueError(self._absent())
        if "array_record" not in formats:
            raise ValueError(
                f"{self.folder}: prepared as {' and '.join(sorted(formats))}, which only TensorFlow reads; expected "
                f"array_record. {self._again()}"
            )
        features = self._builder.info.features
        if not {"image", "label"} <= set(features) or not getattr(features["label"], "names", None):
            raise ValueError(f"{self.folder}: expected an image and a class label; TFDS has {', '.join(features)}.")
        self.class_names: tuple[str, ...] = tuple(features["label"].names)

    def examples(self, part: str) -> Examples:
        """All examples of a split, in memory.

        Raises:
          ValueError: there is no such split, a file is missing or damaged, or images and labels are not right.
        """
        n, read = self._reader(part)
        found = [example for first in range(0, n, _AT_ONCE) for example in read(range(first, min(first + _AT_ONCE, n)))]
        kinds = {(example["image"].dtype, example["image"].shape) for example in found}
        if len(kinds) != 1 or next(iter(kinds))[0] != np.uint8:
            raise ValueError(
                f"{self.folder}: images of split {part} must be of one shape, uint8 [H, W, C]; got "
                f"{' and '.join(sorted(f'{kind} {list(shape)}' for kind, shape in kinds)[:3])}."
            )
        images = np.stack([example["image"] for example in found])
        check_shape(images.shape, f"{self.folder}: images of split {part}")
        labels = np.asarray([example["label"] for example in found])
        return images, whole_labels(labels, f"{self.folder}: labels of split {part}", n, len(self.class_names))

    def encoded(self, part: str, size: int) -> EncodedImages:
        """A split whose images stay encoded; `size` is their side once they are decoded.

        Raises:
          ValueError: there is no such split, or a file is missing.
        """
        import tensorflow_datasets as tfds

        n, read = self._reader(part, {"image": tfds.decode.SkipDecoding()})

        def records(places: list[int]) -> list[Record]:
            return [(example["image"], example["label"]) for example in read(places)]

        name = f"{self._builder.info.full_name}, split {part} of {n} images"
        return EncodedImages(name, records, np.arange(n, dtype=np.int32), size, len(self.class_names))

    def _reader(self, part: str, decoders: Any = None) -> tuple[int, Callable[[Sequence[int]], list[dict[str, Any]]]]:
        """How many examples a split has, and what reads those at some places."""
        splits = self._builder.info.splits
        if part not in splits:
            hint = " Without one it can be evaluated on, and not trained on." if part == "train" else ""
            raise ValueError(f"{self.folder}: there is no split {part}; there are {', '.join(splits)}.{hint}")
        try:
            source = self._builder.as_data_source(part, decoders=decoders, file_format="array_record")
            files = splits[part].file_instructions
            ends = np.cumsum([each.examples_in_shard for each in files])
            shards = [Path(each.filename) for each in files]
            missing = [shard.name for shard in shards if not shard.is_file()]
        except Exception as error:  # what describes it is not right
            raise ValueError(f"{self.folder}: cannot be read ({_told(error)}). {self._again()}") from error
        if missing:
            raise ValueError(f"{self.folder}: {', '.join(missing[:3])} missing. {self._again()}")

        def read(places: Sequence[int]) -> list[dict[str, Any]]:
            try:
                found = list(source.__getitems__(list(places)))
                if any(example["image"] is None or example["label"] is None for example in found):
                    raise ValueError("an empty record")  # what array_record makes of some files that were cut off
            except Exception as error:  # array_record raises its own kinds
                for place in places if len(places) > 1 else ():
                    read([place])
                where = f"{shards[int(np.searchsorted(ends, places[0], 'right'))]}, example {places[0]}"
                raise ValueError(f"{where}: cannot be read ({_told(error)}). {self._again()}") from error
            return found

        return len(source), read

    def _absent(self) -> str:
        hint = "" if self.name in CATALOG else near(self.name, [*CATALOG, "npz"]).capitalize()
        return (
            f"config: dataset {self.name!r} is not prepared in data_dir {self.data_dir}. {hint}{' ' * bool(hint)}"
            f"Prepare it once with:\n  {self._command()}\nor take dataset npz with a data_path."
        )

    def _again(self) -> str:
        """What mends a folder that TFDS takes for complete; what was downloaded is used again."""
        return f"Make it again with:\n  {self._command(f'rm -r {shlex.quote(str(self.folder))} && ')}"

    def _command(self, before: str = "") -> str:
        """What prepares it in a folder where nothing lies; typed into a shell."""
        code = (
            f"import tensorflow_datasets as tfds; tfds.builder({self.name!r}, data_dir={str(self.data_dir)!r}, "
            "file_format='array_record').download_and_prepare()"
        )
        quoted = shlex.quote(code) if set('"$`\\!') & set(code) else f'"{code}"'
        return f"pip install 'rst_jax[prepare]' && {before}python -c {quoted}"


def _told(error: Exception) -> str:
    """An error of another library in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
