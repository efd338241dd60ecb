"""Trackers that a run can log to, beside metrics.jsonl.

This module does not import torch, so that a missing tracker is refused at once.
"""

import importlib.metadata

# {accelerate's name of a tracker: packages, one of which must be installed}
PACKAGES = {
    "tensorboard": ("tensorboard", "tensorboardX"),
    "wandb": ("wandb",),
    "comet_ml": ("comet-ml",),
    "aim": ("aim",),
    "mlflow": ("mlflow",),
    "clearml": ("clearml",),
    "dvclive": ("dvclive",),
    "swanlab": ("swanlab",),
    "trackio": ("trackio",),
}
# {tracker: image (height, width, 3) -> value and options of its log_images}; other trackers get no images.
IMAGE_FORMATS = {
    "tensorboard": lambda image: (image[None], {"dataformats": "NHWC"}),
    "wandb": lambda image: ([image], {}),
    "swanlab": lambda image: ([image], {}),
    "aim": lambda image: (image, {}),
    "clearml": lambda image: (image, {}),
}


def check_tracker(name):
    """Refuse a tracker that accelerate does not support or whose package is missing.

    Accelerate would skip such a tracker silently.
    """
    if name in ("none", "all"):
        return
    if name not in PACKAGES:
        raise ValueError(
            f"--report_to {name} is unknown, expected one of {', '.join(PACKAGES)}, all, or none."
        )
    if not any(_is_installed(package) for package in PACKAGES[name]):
        raise ValueError(
            f"--report_to {name}: it is not installed. pip install {PACKAGES[name][0]}, or add --report_to none "
            "for metrics.jsonl alone."
        )


def _is_installed(package):
    """Whether a package is installed.

    An import would also find a folder of that name, which some trackers create in the working directory.
    """
    try:
        return bool(importlib.metadata.version(package))
    except importlib.metadata.PackageNotFoundError:
        return False


def log_image(tracker, name, image, step):
    """Log an image (height, width, 3) uint8 to one of accelerate's trackers, if it supports images."""
    if tracker.name in IMAGE_FORMATS:
        value, options = IMAGE_FORMATS[tracker.name](image)
        tracker.log_images({name: value}, step=step, **options)
