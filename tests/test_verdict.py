"""The verdict at the end of a run: one word, the reason, and the settings to change."""

import math

import pytest

from wanlite.training.report.history import History
from wanlite.training.report.verdict import judge_run

PHASES = [{"name": "few_step", "first": 0, "last": 1400, "resolution": 0, "size": [64, 64]}]


def figures(error, diversity=0.9):
    measures = {"image_error": error, "diversity": diversity, "channel_drift": 0.05, "saturation": 1.0}
    return {f"{name}_{count}": value for count in (1, 4) for name, value in measures.items()}


def make_history(
    errors, accuracy=None, diversity=0.9, captions=400, is_accepted=True, trajectories=4000, kept=-1
):
    """A finished run whose validations have these image errors; by default the last one is saved."""
    steps = [350 * (number + 1) for number in range(len(errors))]
    results = figures(errors[-1], diversity)
    if accuracy is not None:
        by_steps = {"1": {"accuracy": accuracy / 2}, "4": {"accuracy": accuracy}}
        results |= {"captions": captions, "teacher": {"accuracy": 0.99}, "student_by_steps": by_steps}
    run = {
        "settings": {"max_train_steps": 1400},
        "report": {"phases": PHASES, "counts": {"trajectories": trajectories}},
        "finished": True,
        "chosen": {"step": steps[kept], **({"image_error": errors[kept]} if is_accepted else {})},
        "results": results,
    }
    records = [
        {"step": step, "held_out_error": 0.4, **figures(error, diversity)}
        for step, error in zip(steps, errors)
    ]
    return History(run, records)


@pytest.mark.parametrize(
    "accuracy, word", [(0.98, "good"), (0.9, "good"), (0.6, "not there yet"), (0.1, "failed")]
)
def test_the_judge_of_a_tiny_world_decides_if_there_is_one(accuracy, word):
    verdict = judge_run(make_history([0.9, 0.8], accuracy))
    assert verdict.word == word and verdict.is_good == (word == "good")
    assert f"{accuracy:.1%} of the held-out captions are drawn right in 4 steps, 99.0% by" in verdict.reason


@pytest.mark.parametrize(
    "error, diversity, word",
    [
        (0.3, 0.9, "good"),
        (0.3, 2.4, "not there yet"),
        (0.7, 0.9, "not there yet"),
        (1.1, 0.9, "failed"),
        (math.nan, 0.9, "failed"),
    ],
)
def test_image_error_and_diversity_decide_without_a_judge(error, diversity, word):
    for judged in (None, 1.0):  # an accuracy on few captions counts as none
        history = make_history([error], judged, diversity, captions=19)
        assert judge_run(history).word == word


def test_a_student_whose_validations_were_rejected_has_failed():
    verdict = judge_run(make_history([0.4, 0.3], diversity=0.1, is_accepted=False))
    assert verdict.word == "failed"
    assert "the last one in 1 step: diversity 0.10, at least 0.6" in verdict.reason
    assert "--diversity_gain 0.6: the images of a prompt are too similar" in verdict.advice


@pytest.mark.parametrize(
    "errors, trajectories, advice",
    [
        ([0.8, 0.7], 4000, "--max_train_steps 2800: the error still falls"),
        ([0.7, 0.7], 4000, "--num_trajectories 8000 or a larger --hidden_size"),
        ([0.7], 4000, "--max_train_steps 5600: too few validations"),
        ([0.8, 0.7], 30, "--num_trajectories 300: 30 images of the teacher are few"),
        ([0.5, 0.4], 4000, "nothing is necessary; the error still falls"),
        ([0.4, 0.4], 4000, ""),
    ],
)
def test_the_advice_follows_from_the_trend_and_the_data(errors, trajectories, advice):
    found = judge_run(make_history(errors, trajectories=trajectories)).advice
    assert found.startswith(advice) and bool(found) == bool(advice)


def test_a_few_step_phase_that_learns_its_images_by_heart_is_to_be_shorter():
    advice = judge_run(make_history([0.8, 0.6, 0.62, 0.66], kept=1)).advice
    assert advice.startswith(
        "--few_step_train_steps 700 or --num_trajectories 8000: the error has risen since"
    )
    for errors in ([0.8, 0.6, 0.62, 0.61], [0.8, 0.6, 0.9, 0.6]):
        assert "has risen" not in judge_run(make_history(errors, kept=1)).advice


def test_a_run_without_results_or_metrics_has_a_verdict():
    assert judge_run(History({"finished": True}, [])).word == "failed"
