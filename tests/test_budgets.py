"""--budget and --cache_gb: what they fill in, what wins, and what they refuse."""

from dataclasses import replace
from types import SimpleNamespace

import pytest

from tests.conftest import ROOT, TINY_TEACHER, run_script
from train_distillation import Settings
from wanlite.planning.budgets import BUDGETS, EXPECTATIONS, apply_budget, expected_quality
from wanlite.planning.hardware import fit_to_cache
from wanlite.planning.resolve import complete

TRAIN = ROOT / "train_distillation.py"


def applied(**settings):
    """Return the settings with their budget applied, and the printed lines."""
    lines = []
    return apply_budget(Settings(**settings), lines.append), lines


@pytest.mark.parametrize("name", BUDGETS)
def test_a_budget_fills_in_what_is_unset_and_says_nothing(name):
    settings, lines = applied(budget=name)
    assert {key: getattr(settings, key) for key in BUDGETS[name]._fields} == BUDGETS[name]._asdict()
    assert lines == []


def test_budgets_grow():
    assert list(BUDGETS) == ["trial", "day", "week"]
    sizes = [(budget.num_trajectories, budget.max_train_steps) for budget in BUDGETS.values()]
    assert sizes == sorted(sizes) and len({budget[1:] for budget in BUDGETS.values()}) == 3


@pytest.mark.parametrize(
    "given, words",
    [
        ({"num_trajectories": 500}, "--num_trajectories 500 as given"),
        ({"resolutions": [128, 512]}, "--resolutions 128 512 as given"),
        ({"resolution": [1024]}, "--resolution 1024 as given"),
        ({"max_train_steps": 7, "num_trajectories": 3}, "--num_trajectories 3, --max_train_steps 7 as given"),
    ],
)
def test_a_flag_wins_over_the_budget_and_that_is_said_once(given, words):
    settings, lines = applied(budget="day", **given)
    assert lines == [f"budget   day, but {words}"]
    assert all(getattr(settings, name) == value for name, value in given.items())
    if "resolution" in given:
        assert settings.resolutions is None


def test_the_last_size_of_a_budget_may_be_repeated():
    assert applied(budget="day", resolution=512)[0].resolutions == [256, 512]


def test_a_budget_of_a_tiny_teacher_is_refused():
    with pytest.raises(ValueError, match="--budget day is for Wan2.2 itself, .*tiny teacher.*Leave it out"):
        complete(Settings(teacher=str(TINY_TEACHER), budget="day"))


def test_expectations_grow_with_the_hours():
    texts = [expected_quality(hours) for hours in (0, 12, 13, 60, 61, 400, 1e9)]
    assert list(dict.fromkeys(texts)) == [text for _, text in EXPECTATIONS]


@pytest.mark.parametrize("steps, validation, decay", [(1400, 350, 0.998), (40_000, 1000, 1 - 25 / 40_000)])
def test_long_runs_validate_as_often_and_average_as_much_of_the_run(steps, validation, decay):
    settings = complete(Settings(max_train_steps=steps))
    assert (settings.validation_steps, settings.ema_decay) == (validation, decay)
    settings = complete(Settings(max_train_steps=steps, validation_steps=9, ema_decay=0.5))
    assert (settings.validation_steps, settings.ema_decay) == (9, 0.5)


# ---- the cache ---------------------------------------------------------------------------------------------

FIXED = SimpleNamespace(  # a megabyte for each trajectory, and for each validated one
    cache_bytes=lambda settings, counts, num_validated: 10**6 * (sum(counts) + num_validated)
)


def fitted(gigabytes, wanted, is_given=False, **settings):
    settings = replace(
        Settings(cache_gb=gigabytes, validation_trajectories=4, **settings), num_trajectories=wanted
    )
    return fit_to_cache(settings, FIXED, is_given)


def test_the_cache_lowers_the_default_number_of_trajectories():
    assert fitted(None, 4000) == 4000 and fitted(10, 4000) == 4000
    assert fitted(1.004, 4000) == 1000 and fitted(1.0035, 4000) == 999
    assert fitted(1.004, 4000, resolutions=[32, 64]) == 700  # and 300 of 64 pixels
    assert fitted(0.01, 6) == 6


def test_a_number_of_trajectories_beyond_the_cache_is_refused_with_the_largest_possible():
    with pytest.raises(ValueError, match="--num_trajectories 4000 needs 4 GB of cache.*lower .* to 1000"):
        fitted(1.004, 4000, is_given=True)
    assert fitted(1.004, 1000, is_given=True) == 1000


@pytest.mark.parametrize("gigabytes", [1e-6, 0.067])
def test_a_cache_below_one_file_is_refused(gigabytes):
    with pytest.raises(
        ValueError, match="holds less than one file of 64 trajectories .*: 0.068 GB. Raise it"
    ):
        fitted(gigabytes, 4000)


def test_a_dry_run_honours_the_cache(tmp_path):
    process = run_script(
        TRAIN, "--dry_run", "--output_dir", tmp_path, "--cache_gb", 0.05, "--num_held_out", 16
    )
    assert process.returncode == 0, process.stderr
    (count,) = [int(word.replace(",", "")) for word in process.stdout.split("work     ")[1].split()[:1]]
    assert 800 < count < 900
