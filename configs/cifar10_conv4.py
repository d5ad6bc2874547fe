"""Conv4 on CIFAR-10 at ratio .5: the cheapest network on the real images.

    python -m rst_jax.main --config=configs/cifar10_conv4.py --config.data_dir=DIR

The released code's settings for Conv2/4/6: 100 epochs, cosine, batch 128, decay 1e-4. No dense network is trained.

Measured on 2 cores of an AMD EPYC, 2026-11-22: 2.4 s a step, 391 steps an epoch of all 50,000 images. After one epoch
(--config.holdout=0 --config.select_on=test) it stands at chance: 10.2 % natural and 7.5 % PGD-20 on the 10,000 test
images.
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    c = base.get_config()
    c.model = "conv4"
    c.remaining_ratios = (0.5,)
    c.batch_size = 128
    c.epochs = 100
    c.optimizer.weight_decay = 1e-4
    c.optimizer.schedule = "cosine"
    c.dense.train = False
    return c
