"""Runs that are stopped, killed, or out of disk space or finite numbers: their messages, their files, and
their weights.
"""

import gc
import json
import os
import shlex
import shutil
import signal
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

import train_distillation
from tests.conftest import ROOT, SHORT_RUN, fork, run_script
from wanlite.files.atomic import write_json
from wanlite.planning import hardware
from wanlite.teacher.model import Expert
from wanlite.training.checkpoints import checkpoint_path, latest_checkpoint, load_checkpoint, save_checkpoint
from wanlite.training.phase_table import PHASES
from wanlite.training.report.tables import format_duration
from wanlite.training.run_folder import read_run
from wanlite.training.validation import Validator

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def folder(finished_run, tmp_path):
    """An output folder with the projection and cache of a run with the same settings."""
    shutil.copytree(finished_run[0] / "cache", tmp_path / "run/cache")
    return tmp_path / "run"


def happening_before(function, happenings):
    """Return the function with hooks: before call `number`, happenings[number]() runs and may return a
    factor for the loss.
    """
    numbers = iter(range(1, 10**6))

    def called(*arguments):
        happening = happenings.get(next(numbers), lambda: None)
        if (change := happening()) is None:
            return function(*arguments)
        loss, terms = function(*arguments)
        return loss * change, terms

    return called


def with_losses(happenings):
    """Return PHASES with hooks before their losses, counted over all phases."""
    call = happening_before(lambda loss, *arguments: loss(*arguments), happenings)
    return {name: replace(parts, loss=partial(call, parts.loss)) for name, parts in PHASES.items()}


def train(folder, *flags, short_run=SHORT_RUN, at=None, checks=None, guards=None, **seams):
    """Run the training command in its own process; return its exit code and output.

    `at` is {micro-batch number in this process: function called before it, which may return a factor for its
    loss}; `checks` is the same for validations on held-out states; `guards` replaces
    Validator.find_violations; `seams` are arguments of train_distillation.main().
    """

    class Watched(Validator):
        find_violations = staticmethod(guards or Validator.find_violations)
        held_out_error = happening_before(Validator.held_out_error, checks or {})

    def as_typed():
        phases = with_losses(at or {})
        sys.argv = ["train_distillation.py", "--output_dir", str(folder), *map(str, (*short_run, *flags))]
        with open(f"{folder}.log", "w") as log, redirect_stdout(log), redirect_stderr(log):
            try:
                code = train_distillation.main(
                    *train_distillation.read_settings(), phases=phases, make_validator=Watched, **seams
                )
            except SystemExit as end:  # argparse exits so
                code = end.code
        os._exit(code)

    code = fork(as_typed)
    return code, Path(f"{folder}.log").read_text()


class Scaled(Accelerator):
    """Scales gradients as accelerate does in float16, which needs a GPU."""

    def __init__(self, *arguments, **named):
        super().__init__(*arguments, **named)
        self.scaler = torch.amp.GradScaler("cpu", growth_interval=5)

    def unscale_gradients(self, optimizer=None):
        for prepared in self._optimizers:
            self.scaler.unscale_(prepared.optimizer)


def test_scaled_gradients_train_the_same_student_bit_for_bit(finished_run, folder):
    """Scaling by powers of two is exact in float32. The scale doubles after five steps, once for all
    optimizers.
    """
    assert train(folder, make_accelerator=Scaled)[0] == 0
    assert have_equal_weights(folder, finished_run[0])
    path, _ = latest_checkpoint(folder)
    assert load_checkpoint(path)["scaler"]["scale"] == 2.0 ** (16 + read_run(folder)["steps"] // 5)


def test_the_teacher_is_in_memory_only_in_the_phase_that_uses_it(folder):
    counts = folder.parent / "counts"

    def count():
        with open(counts, "a") as file:
            file.write(f"{sum(isinstance(thing, Expert) for thing in gc.get_objects())} ")

    assert train(folder, at={1: count, 3: count, 6: count})[0] == 0
    velocity, few_step, matching = map(int, counts.read_text().split())
    assert velocity == few_step < matching  # not 0: the forked process inherits the teacher of this one


def send_signal(number=signal.SIGTERM):
    return lambda: os.kill(os.getpid(), number)


def have_equal_weights(folder, other):
    first, second = (load_file(place / WEIGHTS) for place in (folder, other))
    return first.keys() == second.keys() and all(
        torch.equal(tensor, second[name]) for name, tensor in first.items()
    )


def steps(folder):
    return sorted(int(path.name[5:]) for path in (folder / "checkpoints").glob("step-*"))


# ---- interruptions -----------------------------------------------------------------------------------------


def test_a_run_stopped_twice_ends_with_the_same_weights(folder, finished_run):
    for at, step in ((2, 2), (3, 5)):  # the second process starts at step 2
        code, printed = train(folder, at={at: send_signal()})
        assert code == 3 and f"stopped at step {step} of 6" in printed
        assert (
            f"stopped; resume with: python train_distillation.py --output_dir {folder} --num_trajectories 64"
            in printed
        )
        assert step in steps(folder) and not (folder / WEIGHTS).exists()
    code, printed = train(folder)
    assert (
        code == 0
        and f"resumed at step 5 from {checkpoint_path(folder, 5)}" in printed
        and have_equal_weights(folder, finished_run[0])
    )
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records if "held_out_error" in record] == [0, 3, 6]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGUSR1])
def test_every_signal_of_a_scheduler_or_a_user_stops_the_run(number, folder):
    code, printed = train(folder, at={2: send_signal(number)})
    assert code == 3 and "stopped at step 2" in printed


def test_a_second_signal_ends_the_process_at_once(folder):
    def twice():
        send_signal()()
        send_signal()()

    code, _ = train(folder, at={4: twice})
    assert code == -signal.SIGTERM and steps(folder) == [3]


@pytest.mark.slow
@pytest.mark.parametrize("check, kept, step", [(1, [0], 0), (2, [3], 3), (3, [3, 6], 6)])
def test_a_stop_during_validation_loses_nothing(check, kept, step, folder, finished_run):
    code, printed = train(folder, checks={check: send_signal()})
    assert code == 3 and "stopped" in printed and steps(folder) == kept
    code, printed = train(folder)
    assert code == 0 and f"resumed at step {step}" in printed and have_equal_weights(folder, finished_run[0])
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records if "held_out_error" in record] == [0, 3, 6]


@pytest.mark.slow
def test_settings_without_effect_on_weights_may_change_on_resume(folder, finished_run):
    train(folder, at={5: send_signal(signal.SIGKILL)})
    code, printed = train(
        folder, "--checkpointing_steps", "1", "--checkpoints_total_limit", "9", "--report_to", "tensorboard"
    )
    assert (
        code == 0
        and "resumed at step 3" in printed
        and have_equal_weights(folder, finished_run[0])
        and steps(folder) == [3, 4, 5, 6]
    )


@pytest.mark.slow
def test_a_micro_batch_fitted_to_a_machine_stays_on_resume_with_other_memory(folder, monkeypatch):
    place = SHORT_RUN.index("--train_batch_size")
    short_run = SHORT_RUN[:place] + SHORT_RUN[place + 2 :]
    for name, value in (("LARGE_WIDTH", 1), ("DEFAULT_BATCH_SIZE", 256)):
        monkeypatch.setattr(hardware, name, value)

    def train_in(free, *flags, **happenings):
        monkeypatch.setattr(hardware, "free_memory", lambda device, sharing=1: (free, free))
        return train(folder, *flags, short_run=short_run, **happenings)

    code, printed = train_in(20e6)  # less than the tiny teacher's trajectories need
    assert code == 2 and "the teacher's passes do not fit" in printed and "Traceback" not in printed
    code, printed = train_in(150e6, at={1: send_signal()})
    assert code == 3 and "of 4 x 64 states" in printed  # the critic counts, and the teacher beside it
    code, printed = train_in(60e6, "--matching_steps", "0", "--overwrite", at={12: send_signal()})
    assert (
        code == 3
        and "of 8 x 32 states" in printed
        and "60.0 MB free on cpu" in printed
        and "stopped at step 1" in printed
    )
    assert read_run(folder)["fitted"] == {
        "mixed_precision": "no",
        "compile": False,
        "train_batch_size": 32,
        "gradient_accumulation_steps": 8,
    }
    run = read_run(folder)
    write_json(folder / "run.json", {name: value for name, value in run.items() if name != "fitted"})
    code, printed = train_in(60e6, "--matching_steps", "0")
    assert code == 2 and "an unfinished run of an older version" in printed
    write_json(folder / "run.json", run)
    monkeypatch.delattr("wanlite.planning.run.choose_precision")  # the saved choice is used
    code, printed = train_in(1e12, "--matching_steps", "0")
    assert code == 0 and "of 8 x 32 states" in printed and "resumed at step 1" in printed


@pytest.mark.parametrize(
    "flags, words",
    [(["--seed", "1"], "seed was 0, is 1"), (["--max_train_steps", "7"], "max_train_steps was 6, is 7")],
)
def test_a_changed_setting_that_affects_weights_is_named(flags, words, folder):
    train(folder, at={5: send_signal(signal.SIGKILL)})
    code, printed = train(folder, *flags)
    assert code == 2 and words in printed and "--overwrite" in printed and steps(folder) == [3]


@pytest.mark.parametrize(
    "name, value, words",
    [
        ("processes", 2, "the number of processes differs"),
        ("teacher", "0" * 64, "--teacher holds other weights"),
    ],
)
def test_another_world_or_teacher_is_named(name, value, words, folder):
    train(folder, at={5: send_signal(signal.SIGKILL)})
    run = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(run | {name: value}))
    code, printed = train(folder)
    assert code == 2 and words in printed and steps(folder) == [3]


@pytest.mark.slow
def test_a_second_run_in_the_same_folder_is_refused(folder, finished_run):
    def join():
        code, printed = train(folder.with_name("second"), "--output_dir", folder)  # the later flag applies
        folder.with_name("joined").write_text(f"{code} {printed}")

    code, _ = train(folder, at={5: join})
    assert code == 0 and have_equal_weights(folder, finished_run[0])
    joined = folder.with_name("joined").read_text()
    assert joined.startswith("2 ") and "another run is writing there" in joined


# ---- selection of the saved student ------------------------------------------------------------------------


def scores(folder):
    """Return {step: selection score} for every validation."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {
        record["step"]: sum(record[f"image_error_{count}"] for count in (1, 2, 4)) / 3
        for record in records
        if "held_out_error" in record
    }


def test_the_best_student_is_saved_and_not_the_last_also_by_a_resumed_run(folder):
    flags = (
        "--validation_steps",
        "1",
        "--checkpointing_steps",
        "1",
        "--checkpoints_total_limit",
        "9",
        "--lr_warmup_steps",
        "0",
        "--learning_rate",
        "0.05",
    )  # a learning rate that makes students worse
    code, _ = train(folder, *flags, guards=lambda figures: [], at={6: send_signal()})
    assert code == 3
    code, _ = train(folder, *flags, guards=lambda figures: [])
    chosen = json.loads((folder / "run.json").read_text())["chosen"]
    found = {
        step: score for step, score in scores(folder).items() if step > 4
    }  # students of earlier phases are replaced by those of the last
    assert (
        code == 0
        and chosen["step"] == min(found, key=found.get)
        and chosen["image_error"] == min(found.values())
    )
    last = load_file(checkpoint_path(folder, 6) / "state.safetensors")
    saved = load_file(folder / WEIGHTS)
    assert (
        all(torch.equal(saved[name], last[f"/best_weights/{name}"]) for name in saved) or chosen["step"] == 6
    )


@pytest.mark.slow
@pytest.mark.parametrize("rate, ends", [("0.3", True), ("0.003", False)], ids=["worse", "nearer"])
def test_training_ends_early_after_guard_violations_without_improvement(rate, ends, folder):
    """The best earlier student is saved."""
    validations = iter([[]] * 3 + [["diversity 0.00, at least 0.6"]] * 99)
    code, printed = train(
        folder,
        "--validation_steps",
        "1",
        "--lr_warmup_steps",
        "0",
        "--learning_rate",
        rate,
        guards=lambda figures: next(validations),
    )
    rejected = "rejected, unlike the teacher in 1 step: diversity 0.00, at least 0.6"
    run, found = json.loads((folder / "run.json").read_text()), scores(folder)
    first, *later = (found[step] for step in sorted(found) if step > 2)
    assert code == 0 and ("2 validations in a row were rejected" in printed) == ends == (run["steps"] < 6)
    assert ends == all(score >= first for score in later[:2])
    assert run["chosen"]["step"] == min(found.keys() - {0, 1, 2}) and rejected in printed


@pytest.mark.slow
def test_a_run_whose_validations_were_all_rejected_ends_with_a_warning(folder):
    code, printed = train(folder, guards=lambda figures: ["colour drift 1.03, at most 0.3"])
    kept = "kept the last step, 6: no validation came close enough to the teacher"
    assert code == 0 and f"; {kept}\nverdict  failed: no validation was accepted" in printed
    run = read_run(folder)
    assert run["verdict"]["word"] == "failed" and run["chosen"] == {
        "step": 6,
        "kept": kept,
        "why": "the last step, because all validations were rejected",
    }
    rejected = [line for line in printed.splitlines() if "rejected" in line]
    assert rejected and max(map(len, rejected)) <= 100


def test_a_run_reports_the_step_that_it_kept(folder):
    code, printed = train(folder, guards=lambda figures: [])
    run = read_run(folder)
    kept = f"kept step {run['chosen']['step']}, the closest to the teacher"
    duration = format_duration(60 * run["minutes"])
    assert code == 0 and f"finished in {duration}; {kept}\nverdict  " in printed


@pytest.mark.slow
@pytest.mark.parametrize("flags, at", [(["--overwrite"], 2), (["--resume_from_checkpoint", "none"], 4)])
def test_the_command_that_a_stopped_run_prints_resumes_it(flags, at, folder, finished_run):
    """The printed command has no flag that would start the run from the beginning."""
    code, printed = train(folder, *flags, at={at: send_signal()})
    words = shlex.split(printed.partition("stopped; resume with: ")[2].splitlines()[0])
    assert code == 3 and words[:2] == ["python", "train_distillation.py"]
    code, printed = train(folder, *words[4 + len(SHORT_RUN) :])  # after the folder and SHORT_RUN
    assert code == 0 and "resumed at step" in printed and have_equal_weights(folder, finished_run[0])


# ---- invalid checkpoints -----------------------------------------------------------------------------------


def cut(path):
    (path / "state.safetensors").write_bytes((path / "state.safetensors").read_bytes()[:-1])


def test_a_broken_newest_checkpoint_is_skipped_and_reported(folder, finished_run):
    train(folder, "--checkpointing_steps", "2", at={6: send_signal(signal.SIGKILL)})
    assert steps(folder) == [2, 4]
    cut(checkpoint_path(folder, 4))
    code, printed = train(folder)
    assert (
        code == 0
        and "step-000004: skipped, state.safetensors differs" in printed
        and "resumed at step 2" in printed
    )
    assert have_equal_weights(folder, finished_run[0])


@pytest.mark.slow
def test_a_run_never_restarts_by_itself_without_a_valid_checkpoint(folder, finished_run):
    train(folder, at={5: send_signal(signal.SIGKILL)})
    cut(checkpoint_path(folder, 3))
    code, printed = train(folder)
    assert (
        code == 2
        and "no checkpoint is valid, so nothing can be resumed. Add --overwrite" in printed
        and steps(folder) == [3]
    )
    code, printed = train(folder, "--overwrite")
    assert code == 0 and have_equal_weights(folder, finished_run[0])


@pytest.mark.slow
def test_a_critic_of_another_run_is_named(folder):
    train(folder, at={5: send_signal(signal.SIGKILL)})
    path = checkpoint_path(folder, 3)
    state = load_checkpoint(path)
    state["critic"] = {name: tensor[..., :-1].contiguous() for name, tensor in state["critic"].items()}
    shutil.rmtree(path)
    save_checkpoint(folder, 3, state, read_run(folder), 2)
    code, printed = train(folder)
    assert (
        code == 2
        and "the checkpoint's critic is not that of this run" in printed
        and "--overwrite" in printed
    )


@pytest.mark.slow
def test_missing_on_policy_states_are_named(folder):
    train(folder, "--checkpointing_steps", "1", at={6: send_signal(signal.SIGKILL)})
    for own in folder.glob("cache/rollouts-*"):
        shutil.rmtree(own)
    code, printed = train(folder, "--checkpointing_steps", "1")
    assert code == 2 and "the rollout of step 4 is missing" in printed and "Put it back" in printed


# ---- a full disk -------------------------------------------------------------------------------------------


def fill(disk, but):
    """Fill a disk except for `but` bytes."""
    free = shutil.disk_usage(disk).free
    with open(disk / "ballast", "wb") as ballast:
        os.posix_fallocate(ballast.fileno(), 0, free - but)


@pytest.mark.slow
@pytest.mark.parametrize("small_disk", [80], indirect=True)
@pytest.mark.parametrize("is_freed", [True, False], ids=["freed in time", "never freed"])
def test_a_full_disk_costs_one_checkpoint_and_not_the_run_or_an_earlier_one(
    is_freed, folder, small_disk, finished_run
):
    shutil.copytree(folder / "cache", small_disk / "run/cache")
    run = small_disk / "run"
    freed = {5: lambda: (small_disk / "ballast").unlink()} if is_freed else {}
    code, printed = train(
        run, "--checkpointing_steps", "2", at={3: lambda: fill(small_disk, but=300_000)} | freed
    )
    assert (
        "WARNING: step 4 is NOT saved" in printed
        and f"The newest checkpoint is {checkpoint_path(run, 2)}" in printed
    )
    if is_freed:
        assert code == 0 and steps(run) == [2, 6]
    else:
        assert code == 2 and "no space left" in printed and "Traceback" not in printed
        assert latest_checkpoint(run) == (checkpoint_path(run, 2), [])
        (small_disk / "ballast").unlink()
        code, printed = train(run)
        assert code == 0 and "resumed at step 2" in printed
    assert have_equal_weights(run, finished_run[0])


def test_a_disk_that_is_too_small_is_refused_before_anything_is_computed(small_disk):
    code, printed = train(small_disk / "run")
    assert code == 2 and "the disk is too small" in printed and "projected" not in printed


@pytest.mark.slow
@pytest.mark.parametrize("small_disk", [80], indirect=True)
def test_a_disk_that_fills_with_trajectories_ends_the_run_and_keeps_them(
    small_disk, finished_run, monkeypatch
):
    run = small_disk / "run"
    (run / "cache").mkdir(parents=True)
    for start in (finished_run[0] / "cache").glob("start-*"):
        shutil.copytree(start, run / "cache" / start.name)

    def lock_and_fill(*arguments, lock_output=train_distillation.lock_output):
        lock_output(*arguments)  # the disk was large enough when the run was planned
        fill(small_disk, but=100_000)

    with monkeypatch.context() as patches:
        patches.setattr(train_distillation, "lock_output", lock_and_fill)
        code, printed = train(run)
    assert code == 2 and "o space left" in printed and "Traceback" not in printed
    assert not list(run.rglob("*.partial"))
    (small_disk / "ballast").unlink()
    assert train(run)[0] == 0 and have_equal_weights(run, finished_run[0])


def test_an_incomplete_trajectory_file_is_named_and_computed_again(folder, finished_run):
    shard = next(folder.glob("cache/trajectories-*/*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1])
    code, printed = train(folder)
    assert code == 0 and shard.name in printed and have_equal_weights(folder, finished_run[0]), printed


# ---- values that are not finite ----------------------------------------------------------------------------


def test_a_step_without_a_finite_gradient_is_skipped_counted_and_saved(folder, finished_run):
    code, printed = train(folder, at={2: lambda: float("nan"), 5: send_signal(signal.SIGKILL)})
    code, printed = train(folder)
    assert code == 0 and "resumed at step 3" in printed
    run = json.loads((folder / "run.json").read_text())
    assert run["skipped_steps"] == 1 and run["steps"] == 6 and not have_equal_weights(folder, finished_run[0])
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [
        record["skipped_steps"] for record in records if "skipped_steps" in record and record["step"] != 4
    ] == [1, 1, 1]
    assert all(torch.isfinite(tensor).all() for tensor in load_file(folder / WEIGHTS).values())


def test_progress_in_a_log_takes_few_lines(finished_run, tmp_path):
    process = run_script(
        ROOT / "train_distillation.py",
        "--output_dir",
        tmp_path / "run",
        *SHORT_RUN,
        "--max_train_steps",
        "100",
        "--validation_steps",
        "100",
        "--checkpointing_steps",
        "100",
        "--cache_dir",
        finished_run[0] / "cache",
    )
    assert process.returncode == 0 and process.stderr.count("\n") < 10 and "\r" not in process.stderr


@pytest.mark.slow
def test_running_out_of_memory_ends_the_run_with_advice(folder):
    def run_out():
        raise torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 2.00 GiB.\nOf the allocated memory ..."
        )

    code, printed = train(folder, at={5: run_out})
    assert (
        code == 2
        and "Traceback" not in printed
        and "Tried to allocate 2.00 GiB. The teacher's trajectories are kept." in printed
    )
    code, printed = train(
        folder, "--overwrite", "--train_batch_size", "8", "--gradient_accumulation_steps", "2"
    )
    assert code == 0 and "teacher trajectories" not in printed and "of 2 x 8 states" in printed


@pytest.mark.slow
def test_too_many_skipped_steps_in_a_row_end_the_run_with_advice(folder):
    code, printed = train(
        folder, "--max_train_steps", "30", at={number: lambda: float("inf") for number in range(4, 31)}
    )
    assert (
        code == 2
        and "20 steps in a row, up to 23, had no finite gradient" in printed
        and "lower --learning_rate" in printed
    )
    newest, _ = latest_checkpoint(folder)
    assert all(
        torch.isfinite(tensor).all()
        for tensor in load_file(newest / "state.safetensors").values()
        if tensor.is_floating_point()
    )


def test_more_trajectories_generate_only_what_a_shorter_run_lacks(finished_run, tmp_path):
    shutil.copytree(finished_run[0] / "cache", tmp_path / "run/cache")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run/cache").rglob("shard-*")}
    _, printed = train(
        tmp_path / "run", "--num_trajectories", "80", at={1: lambda: signal.raise_signal(signal.SIGTERM)}
    )
    assert "generated 16 trajectories" in printed
    assert {path: path.stat().st_mtime_ns for path in before} == before
