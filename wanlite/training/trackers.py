"""The trackers that a run can log to, beside metrics.jsonl. No torch: a missing one is refused at once."""

import importlib.metadata

# As accelerate names them -> the packages of which one has to be there.
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
# How their log_images takes a picture (height, width, 3); those that are not here take none.
PICTURES = {
    "tensorboard": lambda picture: (picture[None], {"dataformats": "NHWC"}),
    "wandb": lambda picture: ([picture], {}),
    "swanlab": lambda picture: ([picture], {}),
    "aim": lambda picture: (picture, {}),
    "clearml": lambda picture: (picture, {}),
}


def check_tracker(name):
    """Refuse a tracker that accelerate does not know, or whose package is not installed: accelerate would
    leave it out silently.
    """
    if name in ("none", "all"):
        return
    if name not in PACKAGES:
        raise ValueError(
            f"--report_to {name} is unknown, expected one of {', '.join(PACKAGES)}, all, or none."
        )
    if not any(_is_installed(package) for package in PACKAGES[name]):
        raise ValueError(
            f"--report_to {name}: it is not installed. pip install {PACKAGES[name][0]}, or add --report_to "
            f"none for "
            "metrics.jsonl alone."
        )


def _is_installed(package):
    """Whether a package is there; a folder of that name, as a tracker leaves where a run was started, is
    none.
    """
    try:
        return bool(importlib.metadata.version(package))
    except importlib.metadata.PackageNotFoundError:
        return False


def log_image(tracker, name, picture, step):
    """Give one of accelerate's trackers a picture (height, width, 3) uint8, if it takes pictures."""
    if tracker.name in PICTURES:
        values, options = PICTURES[tracker.name](picture)
        tracker.log_images({name: values}, step=step, **options)
