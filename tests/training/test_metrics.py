import json
import shutil

import pytest

from rst_jax.runtime.files import read_lines
from rst_jax.training.metrics import MetricsWriter, _events, means


def test_means_of_sums():
    assert means({"loss": 6.0, "correct": 3.0, "count": 4.0}) == {"loss": 1.5, "adversarial_accuracy": 0.75}


def test_a_resumed_run_drops_what_it_will_write_again(tmp_path):
    writer = MetricsWriter(tmp_path)
    for run in ("a", "b"):
        writer.begin(run, 0)
        for step in (10, 20, 30):
            writer.write(run, step, {"loss": 1.0})
    writer.begin("b", 20)
    writer.write("b", 30, {"loss": 2.0})
    writer.close()
    rows = read_lines(tmp_path / "metrics.jsonl")
    assert [(r["run"], r["step"], r["loss"]) for r in rows] == [
        ("a", 10, 1), ("a", 20, 1), ("a", 30, 1), ("b", 10, 1), ("b", 20, 1), ("b", 30, 2),
    ]  # fmt: skip
    assert list((tmp_path / "tensorboard" / "a").glob("events*"))


def test_a_line_cut_by_a_kill_is_left_out_and_the_next_one_is_whole(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps({"run": "a", "step": 1}) + '\n{"run": "a", "st')
    assert read_lines(path) == [{"run": "a", "step": 1}]
    writer = MetricsWriter(tmp_path)
    writer.begin("a", 1)
    writer.write("a", 2, {})
    writer.close()
    assert [r["step"] for r in read_lines(path)] == [1, 2]


def test_a_process_that_may_not_write_does_not(tmp_path):
    writer = MetricsWriter(tmp_path, active=False)
    writer.begin("a", 0)
    writer.write("a", 1, {"loss": 1.0})
    writer.close()
    assert not list(tmp_path.iterdir())


def points(folder):
    """Of all files of events: (name, step, value, time)."""
    events = [event for path in sorted(folder.iterdir()) for event in _events(path)]
    return [(v.tag, e.step, v.simple_value, e.wall_time) for e in events for v in e.summary.value]


def test_events_are_those_of_the_rows_each_once_whenever_a_kill_came(tmp_path):
    """Kills before the events were flushed, within one, and between the new file and the removal of the old one."""
    folder, writer = tmp_path / "tensorboard" / "a", MetricsWriter(tmp_path)
    writer.begin("a", 0)
    for step in (10, 20, 30):
        writer.write("a", step, {"loss": float(step), "accuracy": 0.5})
    writer.flush()
    (old,) = folder.iterdir()
    writer.write("a", 40, {"loss": 40.0})
    old.write_bytes(old.read_bytes()[:-7])  # the event of accuracy at step 30 is cut off
    shutil.copy(old, folder / "events.out.tfevents.0.another")  # both of an earlier kill are there
    times = {(name, step): when for name, step, _, when in points(folder)}
    again = MetricsWriter(tmp_path)
    again.begin("a", 30)
    again.write("a", 40, {"loss": 41.0})
    again.close()
    found = points(folder)
    expected = [(n, s, v) for s in (10, 20, 30) for n, v in (("loss", s), ("accuracy", 0.5))] + [("loss", 40, 41)]
    assert [point[:3] for point in found] == expected
    assert all(when == times[name, step] for name, step, _, when in found[:5])
    assert len(list(folder.iterdir())) == 1
    writer.close()


def test_a_damaged_file_of_events_is_made_again(tmp_path):
    writer = MetricsWriter(tmp_path)
    writer.begin("a", 0)
    writer.write("a", 1, {"loss": 1.0})
    writer.close()
    (file,) = (tmp_path / "tensorboard" / "a").iterdir()
    for content in (b"", b"\xff" * 100, file.read_bytes()[:30] + b"\x07" * 40):
        file.write_bytes(content)
        writer.begin("a", 1)
        writer.close()
        (file,) = file.parent.iterdir()
        assert [point[:3] for point in points(file.parent)] == [("loss", 1, 1.0)]


def test_metrics_that_are_a_link_are_written_nowhere_else(tmp_path):
    (tmp_path / "profile").write_text("mine")
    (tmp_path / "w").mkdir()
    (tmp_path / "w" / "metrics.jsonl").symlink_to(tmp_path / "profile")
    with pytest.raises(OSError, match="symbolic"):
        MetricsWriter(tmp_path / "w").write("a", 1, {"loss": 0.5})
    assert (tmp_path / "profile").read_text() == "mine"
