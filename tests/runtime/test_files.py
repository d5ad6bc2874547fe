import numpy as np
import pytest

from rst_jax.records import digest
from rst_jax.runtime.files import Pieces, arrays_in_pieces, read_arrays, write_arrays, write_arrays_in_pieces

WHOLE = {"a/b": np.arange(21, dtype=np.float32).reshape(7, 3, 1), "label": np.arange(7, dtype=np.int32)}


def in_pieces():
    return {
        "a/b": Pieces((7, 3, 1), np.dtype(np.float32), iter(np.split(WHOLE["a/b"], [2, 5]))),
        "label": WHOLE["label"],
    }


def same(found):
    assert found.keys() == WHOLE.keys()
    for name, array in WHOLE.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array)


def test_arrays_that_come_in_pieces_are_a_file_like_any_other(tmp_path):
    write_arrays_in_pieces(tmp_path / "new" / "x.npz", in_pieces())
    same(read_arrays(tmp_path / "new" / "x.npz"))
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["x.npz"]


@pytest.mark.parametrize("rows", [1, 3, 7, 100])
def test_any_file_of_arrays_is_read_in_pieces(rows, tmp_path):
    write_arrays(tmp_path / "x.npz", WHOLE)
    with arrays_in_pieces(tmp_path / "x.npz", rows) as arrays:
        assert arrays["a/b"].shape == (7, 3, 1)
        pieces = {name: list(array) for name, array in arrays.items()}
    assert max(len(piece) for piece in pieces["a/b"]) == min(rows, 7)
    same({name: np.concatenate(array) for name, array in pieces.items()})


def test_no_file_of_arrays_is_told(tmp_path):
    (tmp_path / "x.npz").write_text("no")
    with (
        pytest.raises(ValueError, match=r"x\.npz: not a readable file of arrays"),
        arrays_in_pieces(tmp_path / "x.npz", 3),
    ):
        pass


def test_the_digest_of_pieces_is_that_of_the_whole():
    assert digest(in_pieces()) == digest(WHOLE)
