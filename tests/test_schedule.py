"""The saved scheduler: every setting equals that of the training, or it is refused by name."""

import inspect
import json

import pytest
from diffusers import UniPCMultistepScheduler

from wanlite.flow import make_scheduler
from wanlite.schedule import read_schedule, recorded_schedule, scheduler_defaults, still_image_shift

FEW, STAGE_ONE = {"flow_shift": 3.0, "few_steps": [1, 2, 4]}, {"flow_shift": 3.0, "few_steps": None}


@pytest.fixture
def folder(tmp_path):
    make_scheduler(3.0, (1, 2, 4)).save_pretrained(tmp_path / "scheduler")
    return tmp_path


def change(folder, **changes):
    place = folder / "scheduler/scheduler_config.json"
    config = json.loads(place.read_text()) | changes
    place.write_text(json.dumps({name: value for name, value in config.items() if value != "left out"}))


def test_defaults_read_from_source_are_those_of_the_class():
    parameters = inspect.signature(UniPCMultistepScheduler.__init__).parameters.values()
    assert scheduler_defaults() == {
        each.name: each.default for each in parameters if each.default is not each.empty
    }


@pytest.mark.parametrize(
    "schedule, few_steps", [(FEW, (1, 2, 4)), (STAGE_ONE, ()), ({}, (1, 2, 4)), ({}, ())]
)
def test_inference_accepts_the_schedule_that_training_saves(schedule, few_steps, tmp_path):
    make_scheduler(3.0, few_steps).save_pretrained(tmp_path / "scheduler")
    found, expected = (
        UniPCMultistepScheduler(**read_schedule(tmp_path, schedule)),
        make_scheduler(3.0, few_steps),
    )
    assert {name: found.config[name] for name in scheduler_defaults()} == {
        name: expected.config[name] for name in scheduler_defaults()
    }


@pytest.mark.parametrize("name", sorted(scheduler_defaults()))
@pytest.mark.parametrize("schedule", [FEW, {}], ids=["recorded", "not recorded"])
def test_a_setting_of_another_value_is_refused(name, schedule, folder):
    value = scheduler_defaults()[name]
    change(folder, **{name: not value if isinstance(value, bool) else "evil"})
    if name == "use_flow_sigmas":  # the training overrides its default
        change(folder, **{name: False})
    with pytest.raises(ValueError, match=f"{name} is .*expected .*Copy the folder again"):
        read_schedule(folder, schedule)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"thresholding": 0}, "thresholding is 0, expected False"),
        ({"num_train_timesteps": True}, "num_train_timesteps is True"),
        ({"disable_corrector": [0, 1, 2]}, "disable_corrector"),
        ({"disable_corrector": "left out"}, r"disable_corrector is \[\]"),
        ({"trained_betas": [0.1] * 10**5}, "trained_betas"),
        ({"flow_shift": "left out"}, "flow_shift is 1.0, expected 3.0"),
        ({"a_new_one": 1}, "a_new_one is 1, expected no such setting"),
        ({"\x1b[2J": 1}, r"'\\x1b\[2J' is 1"),
        ({"_class_name": ["UniPCMultistepScheduler"]}, "_class_name"),
    ],
)
def test_types_lists_and_unknown_settings_are_compared_too(changes, words, folder):
    change(folder, **changes)
    with pytest.raises(ValueError, match=words) as refused:
        read_schedule(folder, FEW)
    assert str(refused.value).isprintable() and len(str(refused.value)) < 500


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_invalid_json(value, folder):
    change(folder, flow_shift=value)
    with pytest.raises(OSError, match="is not a number"):
        read_schedule(folder, FEW)


@pytest.mark.parametrize(
    "changes",
    [
        {"_diffusers_version": "9.9"},
        {"shift_terminal": "left out", "sigma_max": "left out"},
        {"flow_shift": 3},
        {"_name_or_path": "x"},
    ],
)
def test_versions_and_settings_at_their_default_make_no_difference(changes, folder):
    change(folder, **changes)
    assert read_schedule(folder, FEW)["flow_shift"] == 3.0


def test_a_scheduler_loaded_and_saved_by_stock_diffusers_is_accepted(folder):
    UniPCMultistepScheduler.from_pretrained(folder / "scheduler").save_pretrained(folder / "scheduler")
    assert read_schedule(folder, FEW) == read_schedule(folder, {})


@pytest.mark.parametrize(
    "schedule",
    [
        [1],
        "x",
        {"few_steps": [0]},
        {"few_steps": [10**12]},
        {"few_steps": "4" * 10**6},
        {"flow_shift": "3"},
        {"flow_shift": True},
        {"flow_shift": 10**400},
        {"flow_shift": -1},
    ],
)
def test_an_invalid_schedule_record_is_refused_by_name(schedule):
    with pytest.raises(ValueError, match="run.json: ") as refused:
        recorded_schedule({"schedule": schedule}, "run.json")
    assert len(str(refused.value)) < 300


def test_the_shift_of_still_images_grows_with_their_size_from_3_to_5():
    sizes = ((64, 64), (512, 512), (832, 480), (1024, 576), (1280, 720), (1024, 1024), (2048, 2048))
    assert [still_image_shift(*size) for size in sizes] == [3.0, 3.0, 3.29, 4.0, 5.0, 5.0, 5.0]
    assert still_image_shift(480, 832) == still_image_shift(832, 480)
