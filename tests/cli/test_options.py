"""The one parser: values by their fields' types, numbers and fractions, config files and what is laid over them."""

import argparse

import pytest
from ml_collections import ConfigDict, FrozenConfigDict

from rst_jax.cli import draw
from rst_jax.cli.config_file import load
from rst_jax.cli.options import number
from rst_jax.config import Config, from_dict

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
        f"def get_config(): return {made.__name__}({{'epochs': 3, 'threat': {{'eps': 0.5}}}})\n",
    )
    file = load(path, {"threat.norm": "l2"})
    assert file.config() == from_dict({"epochs": 3, "threat": {"eps": 0.5, "norm": "l2"}})
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


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("x = (", "SyntaxError"),
        ("import nothing_there", "ModuleNotFoundError"),
        ("x = 1", "get_config(): AttributeError"),
        ("def get_config(): return 3", "get_config(): TypeError"),
        ("def get_config(): return [3]", "get_config() gave list; expected a ConfigDict or a dict"),
        ("def get_config(): return {}\ndef sweep(): return {'a': {}}", "sweep() gave dict; expected pairs"),
        ("def get_config(): return {}\ndef sweep():\n  yield 1/0", "sweep(): ZeroDivisionError"),
        ("def get_config(): return {}\ndef smoke(): return 1/0", "smoke(): ZeroDivisionError"),
    ],
)
def test_a_broken_file_is_named_with_what_is_wrong(tmp_path, text, words):
    path = write(tmp_path, text)
    with pytest.raises(ValueError) as error:
        load(f"{path}:smoke" if "smoke" in text else path, {})
    assert str(error.value).startswith(f"{path}: ") or words.startswith("get_config() gave") or "sweep() gave" in words
    assert words in str(error.value)
