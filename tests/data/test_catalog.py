import importlib
from pathlib import Path

import numpy as np
import pytest

from configs import digits
from rst_jax import config as config_lib
from rst_jax.data import load_dataset
from rst_jax.data.catalog import CATALOG

CONFIGS = sorted(path.stem for path in (Path(__file__).parents[2] / "configs").glob("*.py"))


@pytest.mark.parametrize("name", CONFIGS)
def test_shipped_configs_augment_as_the_catalogue_says_and_hold_out_a_part(name):
    config = config_lib.from_dict(importlib.import_module(f"configs.{name}").get_config())
    facts = CATALOG[config.dataset]
    assert (config.crop_padding, config.flip) == (facts.crop_padding, facts.flip)
    assert 0 < config.holdout < facts.train
    assert facts.train - config.holdout >= config.batch_size


@pytest.mark.parametrize("name", CATALOG)
def test_entries_are_whole(name):
    facts = CATALOG[name]
    for constants in (facts.mean, facts.std):
        assert constants is None or len(constants) == facts.shape[-1]
    assert (facts.mean is None) == (facts.std is None)
    if facts.streamed:  # no statistics can be taken of what is not read, and the crops are of this size
        assert facts.mean is not None
        assert facts.shape == (facts.streamed, facts.streamed, 3)
        assert facts.crop_padding == 0


def test_the_constants_are_the_papers():
    assert CATALOG["cifar10"].mean == (0.4914, 0.4822, 0.4465)
    assert CATALOG["cifar10"].std == (0.2471, 0.2435, 0.2616)
    assert CATALOG["svhn_cropped"].mean == CATALOG["svhn_cropped"].std == (0.5, 0.5, 0.5)
    assert CATALOG["imagenet2012"].mean == (0.485, 0.456, 0.406)
    assert CATALOG["imagenet2012"].std == (0.229, 0.224, 0.225)
    assert CATALOG["cifar100"].mean is None


def test_the_digits_are_as_the_catalogue_says():
    data, facts = load_dataset(config_lib.from_dict(digits.get_config())), CATALOG["digits"]
    assert len(data.train) + len(data.holdout) == facts.train
    assert data.train.images.shape[1:] == facts.shape
    assert data.num_classes == facts.classes
    for split in (data.train, data.holdout, data.test):
        assert split.levels == facts.levels == np.max(split.images)
