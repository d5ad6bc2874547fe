import csv
import dataclasses
import json
import statistics

import numpy as np
import pytest

from rst_jax import records
from rst_jax.reports import paper

ATTACK = records.AttackRecord("PGD-20", "linf", 8 / 255, 20, 2 / 255, 1, 0)
HERE = records.Provenance("now", "0", "r", {"jax": "0"}, "1 x cpu", "3")


def measured(group, seed, ratio, right):
    natural, robust = records.accuracy(np.ones(10, bool)), records.accuracy(np.arange(10) < right)
    name = "dense" if ratio == 1.0 else f"ratio-{ratio:g}"
    record = records.TicketRecord(
        name, ratio, 1, 10, natural, robust, 0, ATTACK, "digits", "resnet_digits", "float32", "holdout", 3, seed,
        f"digest-{group}-{seed}", HERE,
    )  # fmt: skip
    return paper.Measured(f"{group}-{seed}", group, record)


MEASURED = [
    measured(group, seed, ratio, right + seed)
    for group, right in (("pattern=row", 3), ("pattern=element", 5))
    for seed in range(3)
    for ratio in (0.3, 1.0, 0.1)
] + [measured("alone", 0, 0.1, 5)]


def test_runs_of_other_seeds_are_one_line_with_mean_and_standard_deviation():
    lines = paper.summarise(MEASURED)
    assert [(line.group, line.ticket) for line in lines] == [
        *(("pattern=row", name) for name in ("ratio-0.1", "ratio-0.3", "dense")),
        *(("pattern=element", name) for name in ("ratio-0.1", "ratio-0.3", "dense")),
        ("alone", "ratio-0.1"),
    ]
    line = lines[0]
    assert line.robust.n == 3
    assert line.robust.mean == pytest.approx(0.4)
    assert line.robust.deviation == pytest.approx(statistics.stdev([0.3, 0.4, 0.5]))
    assert line.natural == paper.Spread(1.0, 0.0, 3)
    assert (line.seeds, line.images) == ([0, 1, 2], 10)
    assert line.attack == "PGD-20, linf, eps 8/255, 20 steps of 0.007843, 1 start"
    assert lines[-1].robust == paper.Spread(0.5, None, 1)
    told = paper.sweep_text(lines).splitlines()
    assert told[2].split()[:6] == ["pattern=row", "ratio-0.1", "100.0", "+-", "0.0", "40.0"]
    assert "50.0  1 " in told[8]


@pytest.mark.parametrize("shows", ["robust", "natural"])
def test_files_and_page(tmp_path, shows):
    lines = paper.summarise(MEASURED)
    page = paper.write(tmp_path, "mine", lines, MEASURED, {"kind": "ratio", "shows": shows, "title": "<b>"})
    text = page.read_text()
    assert text.count("<svg") == 1
    assert "<b>" not in text
    assert "digest-alone" in text
    found = json.loads((tmp_path / "results" / "sweep.json").read_text())
    assert found["lines"] == [json.loads(json.dumps(dataclasses.asdict(line))) for line in lines]
    with (tmp_path / "results" / "sweep.csv").open() as file:
        table = list(csv.DictReader(file))
    assert len(table) == 7
    assert (table[0]["group"], table[0]["ticket"], table[0]["n"]) == ("pattern=row", "ratio-0.1", "3")
    assert float(table[0]["robust_mean"]) == lines[0].robust.mean
    assert float(table[0]["robust_deviation"]) == lines[0].robust.deviation
    assert table[-1]["robust_deviation"] == ""
    assert (tmp_path / "results" / "sweep.svg").read_text().startswith("<svg")
    assert paper.write(tmp_path / "plain", "mine", lines, MEASURED, None).read_text().count("<svg") == 0


@pytest.mark.parametrize(
    ("figure", "words"),
    [
        ("ratio", "expected {'kind': 'ratio'"),
        ({}, "expected {'kind': 'ratio'"),
        ({"kind": "ration"}, "kind must be one of ratio; got 'ration'. did you mean 'ratio'?"),
        ({"kind": "ratio", "show": "robust"}, "there is no 'show'; did you mean 'shows'?"),
        ({"kind": "ratio", "shows": "robustness"}, "got 'robustness'. did you mean 'robust'?"),
    ],
)
def test_a_figure_that_no_plot_shows_is_refused(figure, words):
    with pytest.raises(ValueError) as error:
        paper.check_figure(figure)
    assert words in str(error.value)
