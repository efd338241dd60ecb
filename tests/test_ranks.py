"""Two processes in one run, on the CPU over gloo: their training, how they stop, and the state after a
kill.
"""

import json
import os
import re
import shutil
import signal
import socket
import sys
import time
import traceback
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

import train_distillation
from tests.conftest import ROOT, SHORT_RUN, TINY_TEACHER
from tests.test_small_parts import BOTH, FEW, read_weights
from wanlite.data.shards import SHARD_SIZE, shard_path
from wanlite.data.trajectories import TrajectoryGenerator
from wanlite.files.locks import locked
from wanlite.flow import FewSteps, make_scheduler, seeded_noise
from wanlite.planning.resolve import complete
from wanlite.runtime.launch import launched_precision
from wanlite.runtime.ranks import check_devices
from wanlite.teacher.checkpoint import open_teacher_files
from wanlite.teacher.model import Teacher
from wanlite.training.checkpoints import checkpoint_path, latest_checkpoint, load_checkpoint
from wanlite.training.phase_table import PHASES


def start(rank, group, work, log):
    """Fork one process of a group as a launcher does; return its process id."""
    number = os.fork()
    if number:
        return number
    code = 1
    AcceleratorState._reset_state(
        reset_partial_state=True
    )  # undo the state of earlier tests in the forked process
    with open(log, "w", buffering=1) as file, redirect_stdout(file), redirect_stderr(file):
        try:
            if group:
                printed = group | {"RANK": rank, "LOCAL_RANK": rank, "ACCELERATE_USE_CPU": "true"}
                os.environ |= {name: str(value) for name, value in printed.items()}
            code = work(rank)
        except SystemExit as end:
            code = end.code
        except BaseException:
            traceback.print_exc()
    os._exit(code or 0)


def together(work, folder, processes=2):
    """Run `work(rank)` in the processes of a group; return their exit codes and output."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    group = {
        "WORLD_SIZE": processes,
        "LOCAL_WORLD_SIZE": processes,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    logs = [Path(f"{folder}.rank{rank}") for rank in range(processes)]
    numbers = [start(rank, group if processes > 1 else {}, work, log) for rank, log in enumerate(logs)]
    codes = [os.waitstatus_to_exitcode(os.waitpid(number, 0)[1]) for number in numbers]
    return codes, [log.read_text() for log in logs]


def train(folder, *flags, processes=2, at=None):
    """Run the training command in several processes; `at` is {(rank, micro-batch number): function called
    before it}.
    """

    def as_typed(rank):
        numbers = iter(range(1, 10**6))

        def step(name, *arguments):
            (at or {}).get((rank, next(numbers)), lambda: None)()
            return PHASES[name].loss(*arguments)

        phases = {name: replace(parts, loss=partial(step, name)) for name, parts in PHASES.items()}
        sys.argv = [
            "train_distillation.py",
            "--output_dir",
            str(folder),
            *map(str, (*SHORT_RUN, *CHEAP, *flags)),
        ]
        return train_distillation.main(*train_distillation.read_settings(), phases=phases)

    return together(as_typed, folder, processes)


# Every phase of a run with minimal validation. No Muon: its bfloat16 would amplify differences in the last bits.
CHEAP = (
    "--projection",
    "weights",
    "--teacher_steps",
    4,
    "--few_steps",
    1,
    2,
    "--num_inference_steps",
    2,
    "--num_held_out",
    2,
    "--validation_steps",
    100,
    "--validation_prompts",
    "a red ring",
    "--checkpointing_steps",
    2,
    "--checkpoints_total_limit",
    9,
    "--muon_learning_rate",
    0,
    "--train_batch_size",
    32,
)
SHARDED = ("--teacher_residency", "sharded", "--train_batch_size", 16)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A run of one process."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    codes, printed = train(folder, processes=1)
    assert codes == [0], printed
    return folder


@pytest.fixture(scope="module")
def paired(tmp_path_factory):
    """A run of two processes with half the batch each and a sharded teacher."""
    folder = tmp_path_factory.mktemp("paired") / "run"
    codes, printed = train(folder, *SHARDED)
    assert codes == [0, 0], printed
    return folder


def distance(first, second):
    """Return the relative distance of the weights of two networks."""
    gap = sum((first[name].double() - second[name].double()).square().sum() for name in first)
    return float((gap / sum(weight.double().square().sum() for weight in first.values())).sqrt())


def test_two_processes_of_half_a_batch_train_the_same_student_in_every_phase(alone, paired):
    for step, moved in ((2, "student"), (4, "student"), (6, "student"), (6, "critic"), (6, "feature_head")):
        one, two, before = (
            load_checkpoint(checkpoint_path(folder, at))[moved]
            for folder, at in ((alone, step), (paired, step), (alone, max(2, step - 2)))
        )
        assert distance(one, two) < 1e-6, (step, moved)
        assert step == 2 or moved == "feature_head" or distance(one, before) > 1e-3


def test_accumulated_micro_batches_equal_one_batch_without_random_numbers(alone, tmp_path):
    shutil.copytree(alone / "cache", tmp_path / "run/cache")
    train(
        tmp_path / "run",
        "--gradient_accumulation_steps",
        2,
        "--train_batch_size",
        16,
        processes=1,
        at={(0, 5): lambda: os.kill(os.getpid(), signal.SIGKILL)},
    )
    one, two = (
        load_checkpoint(checkpoint_path(folder, 2))["student"] for folder in (alone, tmp_path / "run")
    )
    assert distance(one, two) < 1e-6


@pytest.mark.slow
def test_processes_stop_together_also_after_a_kill_and_the_run_resumes(paired, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(paired / "cache", folder / "cache")

    def send_twice():  # as from a scheduler, whose signal the launcher forwards
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)

    codes, printed = train(folder, *SHARDED, at={(1, 2): send_twice})
    assert (
        codes == [3, 3]
        and "stopped at step 2 of 6" in printed[0]
        and latest_checkpoint(folder)[0] == checkpoint_path(folder, 2)
    )
    began = time.monotonic()
    codes, printed = train(folder, *SHARDED, at={(1, 4): lambda: os.kill(os.getpid(), signal.SIGKILL)})
    assert codes == [2, -9] and time.monotonic() - began < 100
    assert (
        "another process of this run ended" in printed[0]
        and "the same command resumes" in printed[0]
        and "Traceback" not in printed[0]
    )
    assert latest_checkpoint(folder) == (checkpoint_path(folder, 4), [])
    codes, printed = train(folder, *SHARDED)
    assert codes == [0, 0] and "resumed at step 4" in printed[0]
    first, second = (load_file(place / "diffusion_pytorch_model.safetensors") for place in (folder, paired))
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


@pytest.mark.slow
def test_small_parts_of_two_processes_are_those_of_one(paired, tmp_path):
    flags, folder = ("--train_batch_size", 16, *BOTH, *FEW), tmp_path / "run"
    shutil.copytree(paired / "cache", folder / "cache")
    codes, printed = train(folder, *flags)
    assert codes == [0, 0], printed
    for processes in (1, 2):  # of the finished run, whose parts are missing
        copied = tmp_path / str(processes)
        shutil.copytree(folder, copied, ignore=shutil.ignore_patterns("small"))
        record = json.loads((copied / "run.json").read_text())
        del record["small"]
        (copied / "run.json").write_text(json.dumps(record))
        codes, printed = train(copied, *flags, processes=processes)
        assert codes == [0] * processes, printed
        assert read_weights(copied / "small") == read_weights(folder / "small")


def test_a_folder_in_use_by_another_run_is_refused_in_one_line_for_all_ranks(alone, tmp_path):
    (tmp_path / "run").mkdir()
    shutil.copytree(alone / "cache", tmp_path / "run/cache")
    with locked(tmp_path / "run/cache"):
        codes, printed = train(tmp_path / "run")
    assert codes == [2, 2]
    lines = [line for line in "".join(printed).splitlines() if "train_distillation.py" in line]
    assert (
        len(lines) == 1 and "another run is writing there" in lines[0] and "Traceback" not in "".join(printed)
    )


# ---- a sharded teacher -------------------------------------------------------------------------------------


def test_a_sharded_teacher_equals_a_full_one_with_half_of_the_blocks_per_rank(
    teacher, prompt_embeddings, noisy, tmp_path
):
    def use_teacher(rank):
        torch.distributed.init_process_group("gloo")
        rows = 1 + 3 * rank  # rank 0 makes two more passes than its one row needs
        shared = Teacher(open_teacher_files(TINY_TEACHER), residency="sharded", tokens_at_once=64)
        for level in (999.0, 100.0):
            requested = (
                noisy[:rows],
                torch.full((rows,), level),
                *(text.rows(slice(0, rows)) for text in prompt_embeddings),
                4.0,
                3.0,
                (2,),
            )
            for found, expected in zip(shared.velocity(*requested), teacher.velocity(*requested)):
                torch.testing.assert_close(
                    found, expected, rtol=1e-5, atol=5e-5
                )  # other rows are batched together
        whole = [
            tensor for name, tensor in teacher.expert("low").named_parameters() if name.startswith("blocks.")
        ]
        kept = [tensor.to_local() for tensor in shared.expert("low").blocks.parameters()]
        assert sum(map(torch.numel, kept)) <= 0.51 * sum(map(torch.numel, whole))
        with pytest.raises(RuntimeError, match="different experts"):
            shared.velocity(noisy, torch.full((4,), 999.0 if rank else 100.0), prompt_embeddings[0])
        torch.distributed.destroy_process_group()
        return 0

    codes, printed = together(use_teacher, tmp_path / "ask")
    assert codes == [0, 0], printed


def test_synchronous_ranks_write_each_shard_once_with_the_usual_jobs(tmp_path):
    jobs = [(number, "x", number) for number in range(2 * SHARD_SIZE + 5)]

    def generate(rank):
        requested = []

        def velocity_for(prompts, has_features):
            requested.append(len(prompts))
            return lambda latents, timestep: (latents, torch.zeros(len(prompts), 4, 2))

        states = TrajectoryGenerator(
            Accelerator(), velocity_for, make_scheduler(3.0), 1, True, torch.eye(2)
        ).generate(tmp_path, jobs, (1, 2, 2))
        noise, _, prompt = states.ends(range(len(jobs)))
        assert requested == [SHARD_SIZE] * 2 and prompt.tolist() == list(range(len(jobs)))
        assert torch.allclose(noise, seeded_noise((1, 2, 2), prompt.tolist()), atol=0.02)
        return 0

    codes, printed = together(generate, tmp_path / "generate")
    assert codes == [0, 0], printed
    assert sorted(path.name for path in tmp_path.glob("*.safetensors")) == [
        shard_path(tmp_path, index, jobs[SHARD_SIZE * index : SHARD_SIZE * (index + 1)]).name
        for index in range(3)
    ]


def test_ranks_sample_the_rows_of_one_batch_at_one_level():
    def samples(rank, ranks):
        few, generator = FewSteps(3.0, (1, 2), (1, 2, 2), 10, (rank, ranks)), torch.Generator().manual_seed(0)
        images = few.draw(4 // ranks, lambda latents, timestep: latents, generator, "cpu")
        return [images, *few.renoise(images, generator), *few.renoise(images, generator, is_one_level=True)]

    for whole, first, second in zip(samples(0, 1), samples(0, 2), samples(1, 2)):
        assert torch.equal(whole, torch.stack([first, second], 1).flatten(0, 1))
    assert len(whole.unique()) == 1  # the last is the level


# ---- accelerate's config -----------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_accelerate_loads_every_config_and_its_first_line_has_the_command(path):
    config = load_config_from_file(str(path))
    machines, gpus = [1, *map(int, re.findall(r"\d+", path.stem))][-2:]
    assert (config.num_machines, config.num_processes) == (machines, machines * gpus)
    assert config.mixed_precision == "bf16" and not config.use_cpu
    command = path.read_text().splitlines()[0]
    assert (
        f"accelerate launch --config_file configs/{path.name}" in command
        and "train_distillation.py" in command
    )


@pytest.mark.parametrize(
    "printed, flags, words",
    [
        ({"ACCELERATE_USE_FSDP": "true"}, {}, "trains with FSDP; a student is small"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, {}, "trains with DeepSpeed"),
        ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}, {}, "has gradient_accumulation_steps 4"),
        ({"ACCELERATE_MIXED_PRECISION": "fp8"}, {}, "has mixed_precision fp8, expected no, bf16, fp16"),
        ({}, {"teacher_residency": "sharded"}, "and there is one. Start the run with accelerate launch"),
        (
            {"LOCAL_WORLD_SIZE": "2"},
            {"teacher_residency": "sharded", "teacher_fp8": True},
            "leave --teacher_fp8 out",
        ),
    ],
)
def test_a_launch_that_contradicts_the_flags_is_refused(printed, flags, words, monkeypatch):
    for name, value in printed.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=words):
        complete(train_distillation.Settings(**flags))


@pytest.mark.parametrize(
    "requested, config, expected, is_reported",
    [
        (None, None, None, False),
        (None, "no", None, False),
        (None, "bf16", "bf16", False),
        ("no", "bf16", "no", True),
        ("fp16", "bf16", "fp16", True),
        ("bf16", "no", "bf16", False),
        ("bf16", "fp8", "bf16", True),
    ],
)
def test_the_precision_comes_from_the_flag_else_from_the_config(
    requested, config, expected, is_reported, monkeypatch
):
    if config:
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", config)
    warnings = []
    assert launched_precision(requested, warnings.append) == expected and bool(warnings) == is_reported
    assert not warnings or warnings == [
        f"--mixed_precision {requested} overrides {config} of accelerate's config"
    ]


def test_more_processes_than_gpus_are_refused_except_on_the_cpu(monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "99")
    with pytest.raises(ValueError, match="started 99 processes, one for each GPU; torch finds"):
        check_devices({"ACCELERATE_USE_CPU": "False"})
    check_devices({"ACCELERATE_USE_CPU": "True"})
