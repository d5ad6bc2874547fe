import dataclasses

import jax
import numpy as np
import pytest

from configs import digits
from rst_jax import config as config_lib
from rst_jax.evaluation.accuracy import Evaluator, ticket_record
from rst_jax.experiments.run import Run
from rst_jax.experiments.transfer import _worth_showing, cross
from rst_jax.losses import correct
from rst_jax.runtime.mesh import make_mesh
from tests.drawing import draw
from tests.evaluation.test_accuracy import judged

DIGITS = config_lib.from_dict(digits.get_config())
CONFIG = dataclasses.replace(DIGITS, evaluate=dataclasses.replace(DIGITS.evaluate, steps=4, examples=30))
KEY = np.asarray(jax.random.key_data(jax.random.key(7)))


def test_what_is_shown_is_chosen_batch_by_batch_as_from_the_whole():
    rng = np.random.default_rng(0)
    for rate in (0.02, 0.2, 0.5, 0.8, 0.98):
        natural, robust = rng.random((2, 90)) < np.asarray([[0.8], [rate]])
        kept = np.zeros(0, int)
        for end in range(1, 91):
            chosen = _worth_showing(natural[:end], robust[:end])
            assert set(chosen) <= {*kept, end - 1}
            kept = chosen


@pytest.mark.slow
def test_crossing_keeps_what_is_done_and_knows_its_own(tmp_path, monkeypatch):
    run = Run(CONFIG, tmp_path, print)
    tickets, data = [draw(r)[0] for r in (0.2, 0.5)], run.dataset
    run.evaluator = evaluator = Evaluator(tickets[0].module, CONFIG, make_mesh(), KEY)
    first = cross(run, tickets)
    assert first.robust.shape == (2, 2, 30)
    assert first.natural.shape == (2, 30)
    for i, ticket in enumerate(tickets):
        natural, _, _, adversarial = judged(evaluator, ticket.variables, [ticket.variables], data.test)
        np.testing.assert_array_equal(first.natural[i], natural)
        for j, judge in enumerate(tickets):
            right = correct(evaluator.logits(judge.variables, adversarial), data.test.labels)
            np.testing.assert_array_equal(first.robust[i, j], right)
        np.testing.assert_array_equal(first.shown[i], adversarial[first.shown_index[i]])
        assert len(set(first.shown_index[i])) == 10
    calls = []
    judge_all = evaluator.judged
    monkeypatch.setattr(evaluator, "judged", lambda *args: calls.append(1) or judge_all(*args))
    again = cross(run, tickets)
    np.testing.assert_array_equal(again.robust, first.robust)
    assert not calls
    (tmp_path / "results" / "flags" / "ratio-0.2.npz").write_bytes(b"cut off")
    cross(run, tickets)
    assert len(calls) == 1
    cross(run, tickets[::-1])  # other judges: nothing is reused
    assert len(calls) == 3

    record = ticket_record(tickets[0], evaluator.attack_record, first.natural[0], first.robust[0, 0], 0)
    assert (record.weights_kept, record.weights_total) == tickets[0].weight_counts
    assert record.natural.value == first.natural[0].mean()
