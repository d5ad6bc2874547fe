"""CIFAR-10 tickets of ResNet-18 in as few minutes as keep them robust: 30 epochs in place of 160.

    python -m rst_jax.main --config=configs/cifar10_r18_fast.py --config.data_dir=DIR

A batch of 512 at rate .4, which rises for 6 epochs and falls to 0; PGD-2 of larger steps for the first 8 epochs, PGD-7
after. By operation count 30 epochs are 22 PFLOP a ticket, against 135 for the 160 of configs/cifar10_r18.py. Chosen
from what the literature says of fast adversarial training (Wong et al., 2020) and not tuned: it has not been run on a
GPU yet, so no figure stands here.
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    c = base.get_config()
    c.batch_size = 512
    c.epochs = 30
    c.attack.early_steps = 2
    c.attack.early_epochs = 8
    c.optimizer.learning_rate = 0.4
    c.optimizer.schedule = "linear"
    c.optimizer.unit = "step"
    c.optimizer.warmup_epochs = 6
    c.dense.epochs = 30
    c.dense.learning_rate = 0.2
    c.evaluate.every_epochs = 2
    return c
