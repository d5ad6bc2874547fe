"""The paper's CIFAR-10 tickets: ResNet-18, PGD-7, 160 epochs (Fig. 1 a).

    python -m rst_jax.main --config=configs/cifar10_r18.py --config.data_dir=DIR

Paper's PGD-20 accuracy at ratios .03 .05 .07 .1 .15 .2 .4 .6: 43.9 45.8 47.0 47.0 47.2 47.8 46.8 45.8 %; dense 50.19 %.
It chose its epoch on the test images; this file holds training images out, and `--config.select_on=test
--config.holdout=0` does as the paper did.
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    return base.get_config()
