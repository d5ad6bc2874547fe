import dataclasses
import importlib
import math
import typing
from pathlib import Path

import pytest

from configs import base
from rst_jax import attacks, ranges
from rst_jax import config as config_lib
from rst_jax.threat import ThreatModel

BASE = config_lib.from_dict(base.get_config())


def changed(**fields):
    c = base.get_config().to_dict()
    for name, value in fields.items():
        *sections, last = name.split("__")
        here = c
        for section in sections:
            here = here[section]
        here[last] = value
    return c


def test_base_sets_every_field_with_a_comment_and_nothing_else():
    def names(c, prefix=""):
        for name, value in c.items():
            yield prefix + name
            if hasattr(value, "items"):
                yield from names(value, prefix + name + ".")

    of_the_box = {"threat.lower", "threat.upper"}  # images lie in [0, 1]
    assert sorted(names(base.get_config())) == sorted(set(config_lib.field_names()) - of_the_box)


@pytest.mark.parametrize("path", sorted(Path("configs").glob("*.py")), ids=lambda p: p.stem)
def test_every_config_is_valid(path):
    config = config_lib.from_dict(importlib.import_module(f"configs.{path.stem}").get_config())
    assert dataclasses.is_dataclass(config)
    assert importlib.import_module(f"configs.{path.stem}").__doc__


def test_an_attack_may_begin_with_other_steps():
    attack = config_lib.from_dict(changed(attack__early_steps=2, attack__early_epochs=3)).attack
    assert [attack.pgd(epoch).steps for epoch in range(5)] == [2, 2, 2, 7, 7]


def test_round_trip():
    config = config_lib.from_dict(base.get_config())
    assert config_lib.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"threat__eps": 8.0}, ["threat.eps", "[0, 1]", "8.0", "8/255"]),
        ({"remaining_ratios": (0.1, 1.5)}, ["remaining_ratios", "at most 1", "1.5"]),
        ({"remaining_ratios": (0.0,)}, ["remaining_ratios", "above 0"]),
        ({"optimizer__decay_factor": 0.0}, ["optimizer.decay_factor", "above 0"]),
        ({"optimizer__boundaries": (80, -1)}, ["optimizer.boundaries", "at least 0", "-1"]),
        ({"optimizer__learning_rate": math.inf}, ["optimizer.learning_rate", "at most"]),
        ({"dense__weight_decay": math.nan}, ["dense.weight_decay", "a number"]),
        ({"optimizer__learning_rate": 10**400}, ["optimizer.learning_rate", "at most"]),
        ({"epochs": 10**26}, ["epochs", "at most 2147483647", "27 digits"]),
        ({"seed": 2**32}, ["seed", "below 2**32"]),
        ({"threat__norm": "l2", "evaluate__step_size": math.nan}, ["evaluate.step_size", "a number"]),
        ({"threat__norm": "l2", "attack__step_size": -0.3}, ["attack.step_size", "at least 0"]),
        ({"remaining_ratios": (0.1, 0.1)}, ["distinct"]),
        ({"remaining_ratios": ()}, ["at least one"]),
        ({"attack__step_size": 2.0}, ["attack.step_size", "8/255"]),
        ({"batch_size": 0}, ["batch_size", "at least 1", "0"]),
        ({"batch_size": "many"}, ["batch_size", "int", "'many'"]),
        ({"flip": 1}, ["flip", "bool"]),
        ({"epochs": True}, ["epochs", "int"]),
        ({"pattern": "column"}, ["pattern", "element, row, kernel, filter", "'column'"]),
        ({"holdout": 0}, ["holdout", "positive"]),
        ({"dataset": "npz"}, ["data_path", "--config.data_path"]),
        ({"scale_fan": True}, ["scale_fan", "one ratio"]),
        ({"threat": 3}, ["section", "threat"]),
        ({"threat__lower": 0.5}, ["threat.lower", "0 and 1"]),
        ({"stages": ("report", "search")}, ["stages", "in this order"]),
        ({"stages": ("search", "search")}, ["stages", "in this order"]),
        ({"stages": ()}, ["stages", "some of search, dense"]),
    ],
)
def test_what_is_not_right_is_told_in_a_sentence(fields, words):
    with pytest.raises(ValueError) as error:
        config_lib.from_dict(changed(**fields))
    for word in words:
        assert word in str(error.value)


def test_every_number_has_a_finite_range_by_its_type():
    def numbers(cls):
        for field in dataclasses.fields(cls):
            if dataclasses.is_dataclass(field.type):
                yield from numbers(field.type)
            kind = typing.get_args(field.type)[0] if typing.get_origin(field.type) is tuple else field.type
            bare, limits = ranges.taken_apart(kind)
            if bare in (int, float) or float in typing.get_args(bare):
                yield f"{cls.__name__}.{field.name}", limits

    for name, limits in [*numbers(config_lib.Config), *numbers(config_lib.PGDSettings)]:
        assert limits, name
        assert -math.inf < limits.least < limits.most < math.inf, name


@pytest.mark.parametrize("make", [attacks.APGD, attacks.FAB, attacks.Square, attacks.Bandits, attacks.MIM])
def test_so_are_those_of_the_other_attacks(make):
    with pytest.raises(ValueError, match="steps must be at least 1; got -5"):
        make(steps=-5)
    for name in {"step_size", "rate", "eta", "rho"} & {field.name for field in dataclasses.fields(make)}:
        with pytest.raises(ValueError, match=f"{name} must be a number; got nan"):
            make(**{name: math.nan})


@pytest.mark.parametrize("size", [math.nan, math.inf, -0.3])
def test_the_settings_of_an_attack_are_checked_where_they_are_made(size):
    with pytest.raises(ValueError, match=r"step_size must be (a number|at (least|most))"):
        config_lib.PGDSettings(5, size)


def test_an_unknown_field_names_the_nearest():
    with pytest.raises(ValueError, match=r"no field 'remaining_ratio'; did you mean 'remaining_ratios'"):
        config_lib.from_dict(changed(remaining_ratio=(0.1,)))
    assert "optimizer.learning_rate" in config_lib.unknown_field("optimizer.lerning_rate")


def test_a_missing_field_takes_its_default():
    c = changed(threat__eps=0.1)
    del c["epochs"], c["threat"]["norm"], c["optimizer"]
    assert config_lib.from_dict(c) == dataclasses.replace(BASE, threat=ThreatModel(0.1))


def test_the_defaults_are_those_of_base():
    assert config_lib.Config() == BASE


def test_an_earlier_name_of_a_field_leads_to_the_new_one():
    with pytest.raises(ValueError, match="no field 'task'; did you mean 'stages'"):
        config_lib.from_dict(changed(task="draw"))


def test_one_ratio_may_be_written_without_brackets():
    assert config_lib.from_dict(changed(remaining_ratios=(1,))).remaining_ratios == (1.0,)
