"""Tickets of the digits by pattern: single weights against rows of a kernel, three seeds each, at two ratios.

    python -m rst_jax.main --config=configs/digits_patterns.py --workdir=runs/digits_patterns

The same command, started several times at once, shares the six runs. `--config=configs/digits_patterns.py:smoke` tries
all of it on few images.

Measured in five minutes on 2 shared cores of a CPU: PGD-20 accuracy (20 steps of .012, 1 start, eps .12) on 360 test
images, mean +- standard deviation over the seeds 0 to 2, float32: single weights 81.0 +- 1.1 % at ratio .1 and
82.2 +- .7 % at .3; rows 66.9 +- 3.6 % and 74.8 +- 2.5 %.
"""

from collections.abc import Iterator

from ml_collections import ConfigDict

from configs import digits

FIGURE = {"kind": "ratio", "title": "Single weights and rows"}


def get_config() -> ConfigDict:
    c = digits.get_config()
    c.remaining_ratios = (0.1, 0.3)
    c.dense.train = False
    return c


def sweep() -> Iterator[tuple[str, dict[str, object]]]:
    for pattern in ("element", "row"):
        for seed in range(3):
            yield f"{pattern}-{seed}", {"pattern": pattern, "seed": seed}


def smoke() -> dict[str, object]:
    return {
        "remaining_ratios": (0.3,),
        "epochs": 2,
        "train_examples": 128,
        "attack.steps": 1,
        "evaluate.steps": 2,
        "evaluate.examples": 40,
        "evaluate.every_epochs": 1,
        "checkpoint_every_epochs": 1,
        "log_every_steps": 1,
    }
