"""Lines where standard error is no terminal."""

import pytest

from rst_jax.runtime import progress
from rst_jax.runtime.progress import Progress, make_say


@pytest.fixture
def clock(monkeypatch):
    """Seconds that stand still."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_a_line_at_each_milestone_and_one_every_few_minutes(clock, capsys):
    lines = []
    with Progress(1000, 100, "ratio-0.3", "steps", lines.append) as bar:
        for step in range(101, 601):
            clock[0] += 1.0 if step > 101 else 50.0  # a compilation, which says nothing of the rate
            bar.update(1, lambda step=step: f"step {step}")
            if step % 250 == 0:
                bar.milestone(f"epoch {step // 250}")
    assert lines == [
        "ratio-0.3: step 231; 231 of 1,000 steps, 1 steps/s, 12 min 49 s left",
        "ratio-0.3: epoch 1; 250 of 1,000 steps, 1 steps/s, 12 min 30 s left",
        "ratio-0.3: step 430; 430 of 1,000 steps, 1 steps/s, 9 min 30 s left",
        "ratio-0.3: epoch 2; 500 of 1,000 steps, 1 steps/s, 8 min 20 s left",
    ]
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""


def test_what_was_done_before_says_nothing_of_the_rate(clock):
    lines = []
    with Progress(10_000, 0, "AutoAttack", "passes", lines.append) as bar:
        bar.skip(5000)
        bar.update(100)
        clock[0] += 2 * progress._EVERY
        bar.skip(1000)
        bar.update(180)
    assert lines == ["AutoAttack: 6,280 of 10,000 passes, 0.5 passes/s, 2 h 04 min left"]


def test_short_work_says_nothing_and_lines_go_to_standard_error(clock, capsys):
    with Progress(10, 0, "search", "steps") as bar:
        bar.update(5)
    make_say(active=False)("nothing")
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""
    with Progress(10, 0, "search", "steps") as bar:
        clock[0] += progress._EVERY
        bar.update(10)
    make_say()("something")
    captured = capsys.readouterr()
    assert captured.out.endswith("s] something\n")
    assert captured.err == "rst_jax: search: 10 of 10 steps\n"
