"""Files from anybody: what they declare is looked at first, and whatever is wrong with them is a ValueError."""

import io
import json
import os
import zipfile
from dataclasses import dataclass

import numpy as np
import pytest

from rst_jax.runtime.door import read_json, stored_arrays
from rst_jax.runtime.files import arrays_in_pieces, no_link, read_arrays, read_lines, write_arrays


def npy(array, **changes):
    """The bytes of an .npy file, whose header says something else where it is told to."""
    header = {"descr": np.lib.format.dtype_to_descr(array.dtype), "fortran_order": False, "shape": array.shape}
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, header | changes)
    return file.getvalue() + array.tobytes()


def archive(path, *entries, packed=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, "w", packed) as file:
        for name, content in entries:
            file.writestr(name, content)
    return path


ONES = np.ones((3, 2), np.float32)
DECLARED = {
    "more than it has": {"shape": (2**40, 2)},
    "less than it has": {"shape": (2, 2)},
    "fewer than none": {"shape": (-3, -2)},
    "objects": {"descr": "|O"},
    "nothing, very often": {"descr": "|S0", "shape": (2**60,)},
    "no type": {"descr": "no"},
    "no shape": {"shape": ("x",)},
}


@pytest.mark.parametrize("changes", DECLARED.values(), ids=DECLARED)
def test_an_array_that_is_not_what_its_header_says_is_refused_unread(tmp_path, changes):
    path = archive(tmp_path / "x.npz", ("good.npy", npy(ONES)), ("a.npy", npy(ONES, **changes)))
    with pytest.raises(ValueError, match=r"x\.npz: not a readable file of arrays"), stored_arrays(path):
        pass


def test_what_would_unpack_to_far_more_than_it_is_is_refused_unread(tmp_path):
    path, zeros = tmp_path / "bomb.npz", bytes(2**20)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as file, file.open("a.npy", "w") as member:
        member.write(npy(np.zeros(0, np.uint8), shape=(100 * 2**20,)))
        for _ in range(100):
            member.write(zeros)
    assert path.stat().st_size < 2**20
    for read in (read_arrays, lambda path: arrays_in_pieces(path, 1).__enter__()):
        with pytest.raises(ValueError, match=r"bomb\.npz: .* declare 1 entries of 104,857,728 bytes"):
            read(path)


def test_a_large_array_of_few_bytes_is_read_where_memory_holds_it_easily(tmp_path):
    write_arrays(tmp_path / "black.npz", {"x": np.zeros((2**24,), np.uint8)})
    assert not read_arrays(tmp_path / "black.npz")["x"].any()


@pytest.mark.parametrize("packed", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_other_ways_of_packing_are_refused(tmp_path, packed):
    with pytest.raises(ValueError, match="neither stored nor deflated"):
        read_arrays(archive(tmp_path / "x.npz", ("a.npy", npy(ONES)), packed=packed))


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_two_entries_of_one_name_are_refused(tmp_path):
    with pytest.raises(ValueError, match="two entries have one name"):
        read_arrays(archive(tmp_path / "x.npz", ("a.npy", npy(ONES)), ("a.npy", npy(ONES + 1))))


def test_a_flipped_bit_is_found(tmp_path):
    path = archive(tmp_path / "x.npz", ("a.npy", npy(ONES)), packed=zipfile.ZIP_STORED)
    whole = path.read_bytes()
    place = whole.index(ONES.tobytes()) + 2
    path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
    with pytest.raises(ValueError, match="Bad CRC-32"):
        read_arrays(path)
    with pytest.raises(ValueError, match="Bad CRC-32"), arrays_in_pieces(path, 2) as arrays:
        list(arrays["a"])


@dataclass(frozen=True)
class Two:
    a: int
    b: float = 0.5


WORDS = {
    '{"a": 1, "b": NaN}': "expected a Two; JSON is malformed",
    '{"a": 1, "b": 1e999}': "expected a Two; Number out of range",
    '{"a": 1.5}': "expected a Two; Expected `int`, got `float`",
    '{"b": 1}': "expected a Two; Object missing required field `a`",
    "[" * 100_000: "expected a Two; ",
    '{"a": "\udcff"}': "can't decode|malformed|cannot be read",
}


@pytest.mark.parametrize(("text", "words"), WORDS.items(), ids=range(len(WORDS)))
def test_json_of_another_kind_is_refused_in_a_sentence(tmp_path, text, words):
    (tmp_path / "a.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=rf"a\.json: .*({words})"):
        read_json(tmp_path / "a.json", Two)


def test_what_is_no_ordinary_file_is_refused_at_once(tmp_path):
    """A pipe would be waited for, a device never ends."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "long").write_bytes(b"")
    os.truncate(tmp_path / "long", 2**40)  # takes no room on the disk
    for name, words in (("pipe", "ordinary file"), (".", "ordinary file"), ("none", "no such file")):
        for read in (read_arrays, lambda path: read_json(path, Two)):
            with pytest.raises(ValueError, match=words):
                read(tmp_path / name)
    with pytest.raises(ValueError, match="ordinary file"):
        read_json("/dev/zero", Two)
    with pytest.raises(ValueError, match="at most 67,108,864 bytes"):
        read_json(tmp_path / "long", Two)
    with pytest.raises(ValueError, match="not a readable file of arrays"):
        read_arrays(tmp_path / "long")


def test_of_json_lines_only_rows_are_read(tmp_path):
    path = tmp_path / "a.jsonl"
    rows = [{"run": "dense", "step": 3, "loss": 0.5}, {"run": "dense", "step": 6}]
    others = ["5", "[]", "null", "", '{"run": 1, "step": 2}', '{"run": "dense"}', '{"run": "dense", "step": NaN}', "{"]
    others += ['{"run": "dense", "step": "2"}', '{"run": "dense", "step": 2, "loss": "low"}', "[" * 100_000]
    path.write_text("\n".join([json.dumps(rows[0]), *others, json.dumps(rows[1]), '{"run": ']))
    assert read_lines(path) == rows
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"a\.jsonl: cannot be read"):
        read_lines(path)
    assert read_lines(tmp_path / "none") == []


def test_what_is_written_in_place_follows_no_link(tmp_path):
    (tmp_path / "thesis").write_text("all of it")
    (tmp_path / "link").symlink_to(tmp_path / "thesis")
    with pytest.raises(OSError, match="symbolic"):
        open(tmp_path / "link", "w", opener=no_link)  # noqa: SIM115
    assert (tmp_path / "thesis").read_text() == "all of it"
