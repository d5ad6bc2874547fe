"""Every field a run has, with its unit, its meaning and where its default comes from.

The other files in this folder start from here and set only what differs. Any field can be set on the
command line, for instance `--config.threat.eps=0.1` or `--config.remaining_ratios='(0.05,0.1)'`.
"Paper" is Drawing Robust Scratch Tickets, NeurIPS 2021, arXiv 2110.14068; the defaults are its CIFAR-10
protocol.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    c = ConfigDict()

    # What to do, in this order: search every ratio, train the dense network, evaluate, cross, switch, make evaluation
    # cards (where evaluate.card says so), report. A part needs those before it, in this run or an earlier one.
    c.stages = ("search", "dense", "evaluate", "transfer", "r2s", "cards", "report")
    c.seed = 0  # of the weights, the scores, the data order and the attacks

    # The network and the subnetworks searched in it.
    c.model = "resnet18"  # a name in rst_jax.models.MODELS
    c.remaining_ratios = (0.03, 0.05, 0.07, 0.1, 0.15, 0.2, 0.4, 0.6)  # fractions of weights kept, in (0, 1]
    c.pattern = "element"  # element | row | kernel | filter: the group of weights that shares one score
    c.weight_init = "signed_kaiming_constant"  # a name in rst_jax.initializers.WEIGHTS; paper, Fig. 1 e-f
    c.scale_fan = False  # multiply the fan by the remaining ratio (one ratio at a time)

    # The images.
    c.dataset = "cifar10"  # digits | npz | a TFDS name
    c.data_dir = "~/tensorflow_datasets"  # where TFDS datasets lie, in array_record format
    c.data_path = ""  # dataset = "npz": a file with x_train, y_train, x_test, y_test (uint8 NHWC, integers from 0)
    c.holdout = 5200  # training images held out to choose the best checkpoint; 44,800 = 175 * 256 remain
    c.train_examples = 0  # train on so many images only, for a quick try; 0: all
    c.select_on = "holdout"  # holdout | test: what chooses the best checkpoint ("test" only for parity)
    c.crop_padding = 4  # zero pixels on every side before the random crop; 0: no crop
    c.flip = True  # mirror left-right with probability 1/2

    # The threat model: images lie in [0, 1] and so does eps.
    c.threat = ConfigDict()
    c.threat.norm = "linf"  # linf | l2
    c.threat.eps = 8 / 255  # radius, in [0, 1] image units

    # The inner maximisation of the search. FGSM: 1 step of eps, no random start.
    # FGSM-RS: 1 step of 1.25 eps, random start.
    c.attack = ConfigDict()
    c.attack.steps = 7  # gradient steps; 0 trains on clean images
    c.attack.step_size = 2 / 255  # in [0, 1] image units
    c.attack.random_start = True  # uniform in the threat model's ball
    c.attack.early_steps = 7  # gradient steps during the first early_epochs epochs
    c.attack.early_epochs = 0
    c.attack.batch_norm = "train"  # train: batch statistics, running ones updated at each forward (paper) | eval

    # The outer minimisation: SGD on the scores.
    c.batch_size = 256  # images a step over all devices; the last, short batch of an epoch is used
    c.accumulate = 1  # parts of each device's batch taken one after the other: less memory, statistics of a part
    c.epochs = 160
    c.label_smoothing = 0.0  # mass spread over all classes
    c.optimizer = ConfigDict()
    c.optimizer.learning_rate = 0.1
    c.optimizer.momentum = 0.9
    c.optimizer.nesterov = False
    c.optimizer.weight_decay = 5e-4  # added to the gradient of the scores, before the momentum
    c.optimizer.schedule = "piecewise"  # piecewise | multistep | cosine | linear (to 0)
    c.optimizer.boundaries = (80, 120)  # piecewise: epochs at which the rate is multiplied by decay_factor
    c.optimizer.decay_every = 30  # multistep: so many epochs apart
    c.optimizer.decay_factor = 0.1
    c.optimizer.warmup_epochs = 0  # linear, before any schedule
    c.optimizer.unit = "epoch"  # epoch: the rate is constant within an epoch (paper) | step

    # The dense, adversarially trained network of the same shape: the line to compare tickets with.
    c.dense = ConfigDict()
    c.dense.train = True
    c.dense.learning_rate = 0.1
    c.dense.weight_decay = 5e-4
    c.dense.epochs = 160

    # Evaluation: PGD from one uniform start; an example rests once it is misclassified (paper).
    c.evaluate = ConfigDict()
    c.evaluate.steps = 20
    c.evaluate.step_size = 2 / 255  # in [0, 1] image units
    c.evaluate.batch_size = 250
    c.evaluate.examples = 0  # measure on the first so many test images only; 0: all
    c.evaluate.every_epochs = 5  # of the held-out images during training; the last epoch always is
    c.evaluate.card = (
        "pgd"  # pgd | autoattack | full: at the end, an evaluation card of every ticket (hours, not minutes)
    )

    # The machine.
    c.compute_dtype = "auto"  # auto: bfloat16 on GPU and TPU, float32 on CPU | float32 | bfloat16 | float64
    c.bn_sync = False  # batch statistics over all devices (a collective in every forward) instead of per device
    c.remat = False  # compute a block's activations again in the backward pass: less memory, more time
    c.unroll = "auto"  # auto | scan | unroll: the attack loop; auto unrolls on a CPU
    c.steps_per_dispatch = 0  # training steps a dispatch; 0: one on a CPU, up to 64 elsewhere
    c.compilation_cache = "~/.cache/rst_jax"  # "" turns the persistent compilation cache off

    # Keeping track.
    c.checkpoint_every_epochs = 1
    c.log_every_steps = 50  # training metrics are fetched this often
    return c
