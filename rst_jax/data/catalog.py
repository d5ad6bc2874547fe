"""What is known of each data set, once: sizes, constants and how it is trained on.

A data set that is not here is taken from TFDS as it is: into memory, 8 bits a channel, split "test", with the
statistics of its own training images.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Facts:
    """A data set.

    Attributes:
      train: training images, those that are held out later included.
      shape: of an image, [H, W, C]; of a streamed one, after its crop.
      classes: how many.
      mean, std: of each channel, on the [0, 1] scale; None: of its own training images.
      crop_padding, flip: the usual augmentation, as the fields of the configuration. A streamed data set is trained on
        random resized crops besides.
      test: the split that tests.
      streamed: 0 for images in memory; else they stay encoded and are decoded batch by batch to so many pixels a side.
      levels: the integer that means 1.0.
    """

    train: int
    shape: tuple[int, int, int]
    classes: int
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    crop_padding: int
    flip: bool
    test: str = "test"
    streamed: int = 0
    levels: int = 255


CATALOG: dict[str, Facts] = {
    # scikit-learn's scanned digits, 17 grey levels; every other name is TFDS's
    "digits": Facts(1437, (8, 8, 1), 10, None, None, crop_padding=0, flip=False, levels=16),
    "cifar10": Facts(
        50_000, (32, 32, 3), 10, (0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616), crop_padding=4, flip=True
    ),
    "cifar100": Facts(50_000, (32, 32, 3), 100, None, None, crop_padding=4, flip=True),
    "svhn_cropped": Facts(73_257, (32, 32, 3), 10, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), crop_padding=0, flip=False),
    "imagenet2012": Facts(
        1_281_167,
        (224, 224, 3),
        1000,
        (0.485, 0.456, 0.406),
        (0.229, 0.224, 0.225),
        crop_padding=0,
        flip=True,
        test="validation",
        streamed=224,
    ),
}
