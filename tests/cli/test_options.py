"""The one parser: values by their fields' types, numbers and fractions, config files and what is laid over them."""

import argparse
import dataclasses
import os

import pytest
from ml_collections import ConfigDict, FrozenConfigDict

from rst_jax.cli import draw
from rst_jax.cli.config_file import load
from rst_jax.cli.options import number
from rst_jax.config import Config, from_dict
from rst_jax.experiments.sweep import expand

DIGITS = "--config=configs/digits.py"


def config_of(*words):
    return draw.read(words).file.config()


@pytest.mark.parametrize(
    ("text", "value"), [("8/255", 8 / 255), (".5", 0.5), ("2e-3", 2e-3), ("-1", -1.0), ("3", 3.0), ("1e0/4", 0.25)]
)
def test_numbers_and_fractions(text, value):
    assert number(text) == value


@pytest.mark.parametrize(
    "text", ["", "/", "8/", "/8", "8/0", "nan", "inf", "1/2/3", "1/inf", "inf/2", "1e400", "8 255"]
)
def test_what_is_no_number_is_refused(text):
    with pytest.raises(argparse.ArgumentTypeError, match="expected a number or a fraction such as 8/255; got"):
        number(text)


@pytest.mark.parametrize(
    ("field", "text", "value"),
    [
        ("threat.eps", "8/255", 8 / 255),
        ("epochs", "7", 7),
        ("flip", "True", True),
        ("flip", "false", False),
        ("model", "conv4", "conv4"),
        ("remaining_ratios", "(0.1,0.3)", (0.1, 0.3)),
        ("remaining_ratios", "0.1, 1/3", (0.1, 1 / 3)),
        ("remaining_ratios", "[0.5]", (0.5,)),
        ("remaining_ratios", "0.5", (0.5,)),
        ("optimizer.boundaries", "(3,5,)", (3, 5)),
        ("optimizer.boundaries", "()", ()),
        ("stages", "('search',)", ("search",)),
        ("stages", "search,report", ("search", "report")),
        ("stages", '("search", "report")', ("search", "report")),
        ("data_path", "a=b c.npz", "a=b c.npz"),
    ],
)
def test_a_field_is_set_with_an_equals_sign_and_with_a_space(field, text, value):
    for words in ((f"--config.{field}={text}",), (f"--config.{field}", text)):
        found = config_of(DIGITS, *words)
        for part in field.split("."):
            found = getattr(found, part)
        assert found == value
        assert type(found) is type(value)


def test_the_last_value_counts_and_the_rest_is_the_files():
    assert config_of(DIGITS, "--config.epochs=3", "--config.epochs", "4").epochs == 4
    assert config_of(DIGITS).batch_size == 64
    assert str(draw.read([DIGITS]).workdir) == "runs/digits"
    assert str(draw.read(["--config", "configs/digits_patterns.py:smoke"]).workdir) == "runs/digits_patterns-smoke"


def write(tmp_path, text):
    path = tmp_path / "mine.py"
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize("made", [dict, ConfigDict, FrozenConfigDict])
def test_a_config_may_be_a_dict_of_any_kind(tmp_path, made):
    path = write(
        tmp_path,
        f"from ml_collections import {'ConfigDict' if made is dict else made.__name__}\n"
        f"fields = {{'epochs': 3, 'remaining_ratios': [0.1], 'threat': {{'eps': 0.5}}}}\n"
        f"def get_config(): return {made.__name__}(fields)\n"
        f"def sweep(): yield 'a', {made.__name__}({{'seed': 1}})\n"
        f"def smoke(): return {made.__name__}({{'epochs': 1}})\n",
    )
    file = load(path, {"threat.norm": "l2"})
    assert file.config() == from_dict({"epochs": 3, "remaining_ratios": (0.1,), "threat": {"eps": 0.5, "norm": "l2"}})
    assert [point.config.seed for point in expand(file.points, file.config)] == [1]
    assert load(f"{path}:smoke", {}).config().epochs == 1
    assert file.config({"attack.steps": 2}).attack.steps == 2
    assert file.fields["threat"]["eps"] == 0.5


def test_smoke_lies_over_points_and_the_command_line_over_both(tmp_path):
    path = write(
        tmp_path,
        "def get_config(): return {'epochs': 3, 'seed': 1, 'batch_size': 8}\n"
        "def smoke(): return {'epochs': 1, 'attack.steps': 1}\n",
    )
    file = load(f"{path}:smoke", {"attack.steps": 2})
    assert file.name == "mine-smoke"
    made = file.config({"epochs": 9, "seed": 5})
    assert (made.epochs, made.seed, made.batch_size, made.attack.steps) == (1, 5, 8, 2)
    assert load(path, {}).config() == Config(epochs=3, seed=1, batch_size=8)


FINE = "def get_config(): return {}\n"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("x = (", "SyntaxError: '(' was never closed (line 1)."),
        ("import sys\nx = 1/0", "ZeroDivisionError: division by zero (line 2)."),
        ("import nothing_there", "ModuleNotFoundError: No module named 'nothing_there' (line 1)."),
        ("\n\nraise SystemExit", "SystemExit: (line 3)."),
        ("import sys; sys.exit(0)", "SystemExit: 0 (line 1)."),
        ("raise RuntimeError('a\\nb\\tc')", "RuntimeError: a b c (line 1)."),
        ("x = 1", "defines no get_config(); configs/base.py shows one."),
        ("get_config = 1", "get_config(): TypeError: 'int' object is not callable."),
        ("def get_config(): return 3", "get_config() gave int; expected a ConfigDict or a dict."),
        ("def get_config(): pass", "get_config() gave None; expected a ConfigDict or a dict."),
        ("def get_config(): return [3]", "get_config() gave list; expected a ConfigDict or a dict"),
        ("def get_config(): return 'epochs=3'", "get_config() gave str"),
        ("def get_config():\n  yield {}", "get_config() gave generator"),
        ("def get_config():\n  x = {}\n  return x['a']", "get_config(): KeyError: 'a' (line 3)."),
        ("def get_config():\n  x = {}\n  x['a'] = x\n  return x", "get_config(): RecursionError"),
        ("def get_config(): raise SystemExit(3)", "get_config(): SystemExit: 3 (line 1)."),
        (
            "from ml_collections import ConfigDict, config_dict\n"
            "def get_config(): return ConfigDict({'epochs': config_dict.required_placeholder(int)})",
            "get_config(): RequiredValueError: ",
        ),
        (FINE + "def sweep(): return {'a': {}}", "sweep() gave dict; expected pairs (name, {dotted field: value})."),
        (FINE + "def sweep(): pass", "sweep() gave None; expected pairs"),
        (FINE + "def sweep(): return 3", "sweep() gave int; expected pairs"),
        (FINE + "def sweep():\n  yield 1/0", "sweep(): ZeroDivisionError: division by zero (line 3)."),
        (FINE + "def smoke(): return 1/0", "smoke(): ZeroDivisionError: division by zero (line 2)."),
        (FINE + "def smoke(): pass", "smoke() gave None; expected a ConfigDict or a dict."),
    ],
)
def test_a_broken_file_is_named_with_the_line_and_what_is_wrong(tmp_path, monkeypatch, text, words):
    monkeypatch.chdir(tmp_path)
    path = os.path.relpath(write(tmp_path, text))
    with pytest.raises(ValueError) as error:
        load(f"{path}:smoke" if "smoke" in text else path, {})
    assert str(error.value).startswith((f"{path}: ", f"{path} defines no"))
    assert words in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "text", ["{1: 2}", "{'threat': {None: 1}}", "{'epochs': {}}", "{'threat': 3}", "{'epochs': None}"]
)
def test_fields_that_are_none_are_a_sentence(tmp_path, text):
    with pytest.raises(ValueError, match="config: "):
        load(write(tmp_path, f"def get_config(): return {text}"), {}).config()
    with pytest.raises(ValueError, match="config: there is no field 1"):
        load(write(tmp_path, f"{FINE}def smoke(): return {{1: 2}}") + ":smoke", {}).config()


def test_a_section_of_which_a_file_sets_one_field_keeps_the_others(tmp_path):
    text = "def get_config(): return {'threat': {'norm': 'l2'}, 'optimizer': {'momentum': 0.5}}"
    config = load(write(tmp_path, text), {}).config()
    assert config.threat == dataclasses.replace(Config().threat, norm="l2")
    assert config.optimizer == dataclasses.replace(Config().optimizer, momentum=0.5)


def test_a_mistake_in_what_a_file_imports_is_named_there(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "broken_base.py").write_text("x = 1\ndef")
    path = tmp_path / "mine" / "config.py"
    path.write_text("import mine.broken_base")
    with pytest.raises(ValueError, match=r"config\.py: SyntaxError: .* \(.*broken_base\.py, line 2\)"):
        load(str(path), {})


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("README.md", b"# Title", "expected a Python file, whose name ends in .py"),
        ("x.so", b"\x7fELF", "expected a Python file"),
        ("x.pyc", b"\x00" * 40, "expected a Python file"),
        ("config", b"def get_config(): return {}", "expected a Python file"),
        ("x.py", bytes(range(256)), "Error: "),
        ("x.py", b"\x00" * 4096, "Error: "),
        ("x.py", b"x = '\xff\xfe'", "SyntaxError: "),
        ("x.py", b"(" * 10_000, "Error: "),
        ("folder", None, "is a folder; expected a config file"),
    ],
)
def test_what_is_no_python_is_a_sentence(tmp_path, name, content, words):
    path = tmp_path / name
    if content is None:
        path.mkdir()
    else:
        path.write_bytes(content)
    for named in (str(path), f"{path}:smoke"):
        with pytest.raises(ValueError) as error:
            load(named, {})
        assert words in str(error.value)
        assert str(path) in str(error.value)
        assert "\n" not in str(error.value)
