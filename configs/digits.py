"""Robust scratch tickets on scikit-learn's 1,797 scanned digits (8x8), with nothing to download."""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    c = base.get_config()
    c.dataset = "digits"
    c.model = "resnet_digits"
    c.holdout = 157  # 1,280 = 20 * 64 remain to train on
    c.crop_padding = 0
    c.flip = False
    c.threat.eps = 0.12
    c.attack.steps = 3
    c.attack.step_size = 0.06
    c.remaining_ratios = (0.05, 0.1, 0.3, 0.5)
    c.batch_size = 64
    c.epochs = 15
    c.optimizer.learning_rate = 0.7
    c.optimizer.schedule = "cosine"
    c.optimizer.unit = "step"
    c.dense.learning_rate = 0.2
    c.dense.epochs = 15
    c.evaluate.step_size = 0.012
    c.evaluate.batch_size = 180
    c.evaluate.every_epochs = 5
    c.checkpoint_every_epochs = 5
    c.log_every_steps = 10
    c.unroll = "scan"
    return c
