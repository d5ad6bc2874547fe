"""The tickets kept in the repository: what the index says of them is what they do."""

import json
from pathlib import Path

import numpy as np
import pytest

from rst_jax import records
from rst_jax.tickets.file import load_ticket

ZOO = Path(__file__).parents[2] / "zoo"
INDEX = json.loads((ZOO / "index.json").read_text())


def test_the_index_names_every_ticket_and_record():
    listed = {row["file"] for row in INDEX}
    assert listed == {path.name for path in ZOO.glob("*.ticket")}
    assert {Path(name).stem for name in listed} | {"index"} == {path.stem for path in ZOO.glob("*.json")}


@pytest.mark.parametrize("row", INDEX, ids=lambda row: row["file"])
def test_a_ticket_is_the_one_of_its_record(row):
    ticket = load_ticket(ZOO / row["file"])
    record = records.read_json((ZOO / row["file"]).with_suffix(".json"), records.TicketRecord)
    assert ticket.digest == row["digest"] == record.digest
    assert ticket.weight_counts == (record.weights_kept, record.weights_total)
    assert (row["natural"], row["robust"]) == (record.natural.value, record.robust.value)


@pytest.mark.parametrize("row", [r for r in INDEX if r["dataset"] == "digits"], ids=lambda row: row["file"])
def test_a_ticket_of_the_digits_has_its_natural_accuracy(row):
    from sklearn.datasets import load_digits

    bunch = load_digits()
    rows = np.arange(0, len(bunch.target), 5)
    logits = load_ticket(ZOO / row["file"])((bunch.images[rows, ..., None] / 16).astype(np.float32))
    right = np.argmax(np.asarray(logits), -1) == bunch.target[rows]
    assert right.mean() == pytest.approx(row["natural"], abs=1e-9)
