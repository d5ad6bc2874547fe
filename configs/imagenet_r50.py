"""Tickets of ResNet-50 on ImageNet: PGD-2 at 4/255, 90 epochs, as in the paper's ImageNet protocol.

    python -m rst_jax.main --config=configs/imagenet_r50.py --config.data_dir=DIR --workdir=DIR --coordinator=auto

on every host of a TPU slice (launch/tpu_pod.sh), or without --coordinator on the GPUs of one machine. The dataset is
TFDS's imagenet2012 in array_record format; `python -m rst_jax plan --config=configs/imagenet_r50.py --topology=v5e:4x4`
says what it costs before. A batch of 4096 takes 16 times the rate and a warm-up:

    --config.batch_size=4096 --config.optimizer.learning_rate=4.096 --config.optimizer.warmup_epochs=5

No figure of this configuration has been measured yet.
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    c = base.get_config()
    c.model = "imagenet_resnet50"
    c.remaining_ratios = (0.1, 0.3)
    c.dataset = "imagenet2012"
    c.holdout = 10_000
    c.crop_padding = 0  # random resized crops instead, made while decoding
    c.threat.eps = 4 / 255
    c.attack.steps = 2
    c.batch_size = 256
    c.epochs = 90
    c.optimizer.learning_rate = 0.256
    c.optimizer.momentum = 0.875
    c.optimizer.weight_decay = 2.0**-15
    c.optimizer.schedule = "multistep"
    c.dense.train = False
    c.evaluate.every_epochs = 10
    return c
