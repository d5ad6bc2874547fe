import json

from rst_jax.runtime.files import read_lines
from rst_jax.runtime.progress import Progress, make_say
from rst_jax.training.metrics import MetricsWriter, means


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


def test_quiet_when_not_a_terminal(capsys):
    with Progress(10, 0, "search", "steps") as bar:
        bar.update(5)
    make_say(active=False)("nothing")
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""
    make_say()("something")
    assert capsys.readouterr().out.endswith("s] something\n")
