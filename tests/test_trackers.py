"""Trackers receive metrics and images; one that is not installed is refused before any work."""

import inspect

import numpy as np
import pytest
from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS
from accelerate.utils import LoggerType
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.conftest import ROOT, run_script
from wanlite.training.trackers import IMAGE_FORMATS, PACKAGES, check_tracker, log_image

TRAIN = ROOT / "train_distillation.py"


def is_missing(name):
    try:
        check_tracker(name)
    except ValueError:
        return True


def test_trackers_are_those_of_accelerate():
    assert set(PACKAGES) == set(LoggerType.list()) - {"all"} and set(IMAGE_FORMATS) < set(PACKAGES)


@pytest.mark.parametrize("name", IMAGE_FORMATS)
def test_an_image_is_passed_in_the_format_of_each_tracker(name):
    values, options = IMAGE_FORMATS[name](np.zeros((4, 6, 3), np.uint8))
    inspect.signature(LOGGER_TYPE_TO_CLASS[name].log_images).bind(None, {"grid": values}, step=1, **options)
    assert len(values) == (4 if name in ("aim", "clearml") else 1)  # these take one image, others a list


def test_tensorboard_receives_the_image(tmp_path):
    accelerator = Accelerator(log_with="tensorboard", project_dir=tmp_path)
    accelerator.init_trackers("wanlite")
    log_image(accelerator.trackers[0], "grid", np.full((8, 12, 3), 200, np.uint8), step=7)
    accelerator.end_training()
    events = EventAccumulator(str(tmp_path / "wanlite"))
    events.Reload()
    (image,) = events.Images("grid")
    assert (image.step, image.width, image.height) == (7, 12, 8)


@pytest.mark.parametrize(
    "name, words",
    [
        (next(filter(is_missing, PACKAGES), None), "it is not installed. pip install "),
        ("paper", "is unknown, expected one of tensorboard, wandb"),
    ],
)
def test_an_unavailable_tracker_is_refused_in_one_line_before_any_work(name, words, tmp_path):
    if name is None:
        pytest.skip("every tracker is installed here")
    process = run_script(TRAIN, "--report_to", name, "--output_dir", tmp_path / "run")
    assert (
        process.returncode == 2
        and process.stderr.count("\n") == 1
        and f"--report_to {name}" in process.stderr
    )
    assert words in process.stderr and not (tmp_path / "run").exists()
