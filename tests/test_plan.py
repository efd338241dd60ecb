"""What a run is said to need is what it takes, and saying it writes nothing."""

import os
import re
import shutil
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from diffusers import AutoencoderKLWan
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file, save_file
from torch.nn import functional

from tests.conftest import A14B, ROOT, SHORT_RUN, TINY_TEACHER, run_script, write_sparse_wan
from tests.test_official import write_autoencoder
from train_distillation import Settings, WanLiteStudent, plan
from wanlite.data.autoencoder import decode_latents, load_autoencoder, make_autoencoder
from wanlite.data.trajectories import TrajectoryGenerator
from wanlite.files.atomic import SPARE
from wanlite.flow import make_scheduler
from wanlite.network import pack_text
from wanlite.planning.estimate import choose_precision
from wanlite.planning.memory import (
    MemoryMeter,
    at_depth,
    decoding_peak,
    estimate,
    generation_bytes,
    generation_peak,
    largest_batch,
    pass_peak,
    report,
    simulated_peak,
    start_peaks,
    teacher_bytes,
    training_peak,
)
from wanlite.planning.resolve import complete
from wanlite.runtime.devices import has_gpu
from wanlite.teacher.checkpoint import open_teacher_files
from wanlite.teacher.experts import PROBE_ROWS, PROBE_SIZE, check_experts
from wanlite.teacher.model import Teacher, run_expert, stream_expert
from wanlite.training.optimizers import make_optimizers
from wanlite.training.teacher_data import teacher_velocity

TRAIN = ROOT / "train_distillation.py"


def alive(work):
    """Return the peak of what is alive in work that is really done."""
    with MemoryMeter() as meter:
        work()
    return meter.peak


def train(depth, peak, rate=0.01):
    settings = Settings(muon_learning_rate=rate)
    return training_peak(
        lambda: WanLiteStudent(hidden_size=64, depth=depth, num_heads=2, text_dim=64),
        partial(make_optimizers, settings),
        lambda network: EMAModel(network.parameters()),
        4,
        (16, 16),
        False,
        peak,
    )


def test_the_meter_counts_what_is_alive_and_no_view_twice():
    def work():
        first = torch.zeros(1000)
        second = first.view(10, 100)[3:] + 1  # 700 more
        del first
        torch.zeros(500) + second.sum()  # 500 and 500, after 1000 are gone, beside one

    assert alive(work) == simulated_peak(work) == 4 * (700 + 1000 + 1)


def test_on_a_gpu_a_norm_keeps_its_input_alone():
    def work():
        states = torch.ones(8, 32, 64, dtype=torch.bfloat16, requires_grad=True)
        return [
            functional.rms_norm(states, (64,), torch.ones(64, dtype=torch.bfloat16), 1e-6) for _ in range(3)
        ]

    kept = 2 * 4 * 8 * 32 * 64  # what goes in, and what comes out thrice
    assert simulated_peak(work, "cuda") == pytest.approx(kept, rel=0.06) and simulated_peak(work) > 2.5 * kept
    on_cpu, on_gpu = (train(3, partial(simulated_peak, device_type=device)) for device in ("cpu", "cuda"))
    assert 0.7 * on_cpu < on_gpu < 0.95 * on_cpu


@pytest.mark.parametrize("rate", [0.0, 0.01])
def test_simulated_training_has_the_peak_of_training(rate):
    assert train(3, simulated_peak, rate) == pytest.approx(train(3, alive, rate), rel=0.02)


def test_training_a_large_student_on_a_gpu_keeps_its_norms_in_bfloat16():
    """32 states of 512 px on 1024 x 16: 40.4 GB counted by hand, and 45.9 with norms in float32."""

    def peak_of(depth):
        return training_peak(
            lambda: WanLiteStudent(hidden_size=1024, depth=depth, num_heads=16, text_dim=4096),
            partial(make_optimizers, Settings()),
            lambda network: EMAModel(network.parameters()),
            32,
            (64, 64),
            True,
            partial(simulated_peak, device_type="cuda"),
        )

    assert at_depth(peak_of, 16) == pytest.approx(40.4e9, rel=0.02)


def test_the_peak_of_a_deep_student_follows_from_two_shallow_ones():
    assert at_depth(partial(train, peak=simulated_peak), 9) == pytest.approx(
        train(9, simulated_peak), rel=0.01
    )


def test_simulated_pass_has_the_peak_of_the_tiny_teachers(teacher, prompt_embeddings):
    files = open_teacher_files(TINY_TEACHER)
    text = pack_text([torch.zeros(63, 64)] * 8)  # 64 tokens, one of them the padding's
    latents, timestep = torch.zeros(8, 16, 8, 8), torch.full((8,), 990.0)
    expert = teacher.expert("high")
    with torch.no_grad():
        real = alive(lambda: run_expert(expert, latents, timestep, text))
    told = pass_peak(files, 8, (8, 8), torch.float32)
    inputs = sum(
        tensor.numel() * 4 for tensor in (latents, timestep, *text)
    )  # made inside the simulation alone
    assert told - inputs == pytest.approx(real, rel=0.1)


@pytest.mark.parametrize(
    "tokens_at_once, steps", [(256, 2), (256, 20), (10**6, 6)], ids=["states", "kept", "a pass"]
)
def test_walks_take_what_is_told_of_them(tokens_at_once, steps, tmp_path):
    """Whatever takes most: joining the token states of many passes, what the walks keep, or a pass."""
    files, walks, width = open_teacher_files(TINY_TEACHER), 16, 32
    few = Teacher(files, tokens_at_once=tokens_at_once)
    few.expert("high"), few.expert("low")
    velocity_for = teacher_velocity(few, Settings(), torch.zeros(63, 64))
    text = pack_text([torch.zeros(63, 64)] * walks)
    trajectory_generator = TrajectoryGenerator(
        Accelerator(),
        lambda prompts, has_features: velocity_for(text, has_features),
        make_scheduler(3.0),
        steps,
        basis=torch.zeros(files.width, width),
    )
    real = alive(
        lambda: trajectory_generator.generate(
            tmp_path, [(number, "", number) for number in range(walks)], (16, 16, 16)
        )
    )
    passing = pass_peak(files, min(2 * walks, tokens_at_once // 64), (16, 16), torch.float32)
    told = generation_peak(
        passing,
        walks * 64 * files.width,
        torch.float32,
        generation_bytes(walks, steps, (16, 16, 16), 64, width),
    )
    assert told == pytest.approx(real, rel=0.1)


def test_the_start_is_told_what_comparing_and_one_expert_take():
    files, probe = open_teacher_files(TINY_TEACHER), (PROBE_ROWS, PROBE_SIZE)
    real = alive(lambda: check_experts(files))
    comparing, calibrating = start_peaks(files, probe, 16, (24, 24))
    assert comparing == pytest.approx(real, rel=0.12)
    streamed, more = (
        alive(lambda: stream_expert(files.experts["high"])),
        start_peaks(files, probe, 32, (24, 24))[1] - calibrating,
    )
    assert streamed < calibrating and more == pytest.approx(
        pass_peak(files, 16, (24, 24), torch.float32), rel=0.1
    )
    assert start_peaks(files, probe, 0, (8, 8)) == (comparing, 0)


def test_simulated_decoding_has_the_peak_of_decoding():
    autoencoder, latents = load_autoencoder(TINY_TEACHER), torch.zeros(64, 16, 8, 8)
    real = alive(lambda: decode_latents(autoencoder, latents))
    weights = sum(tensor.numel() * 4 for tensor in autoencoder.state_dict().values())
    told = decoding_peak(partial(make_autoencoder, autoencoder.config), decode_latents, 64, (16, 8, 8))
    assert told == pytest.approx(real + weights + latents.numel() * 4, rel=0.1)


@pytest.mark.parametrize(
    "residency, on_device, beside", [("both", 2, 0), ("one", 1, 2), ("streamed", 0.6, 2.1), ("disk", 0.52, 0)]
)
def test_the_bytes_of_a_teacher_follow_its_residency(residency, on_device, beside):
    files = open_teacher_files(TINY_TEACHER)
    size = 4 * files.num_parameters / 2
    found = teacher_bytes(files, residency, torch.float32, False)
    assert found == (pytest.approx(on_device * size, rel=0.1), pytest.approx(beside * size, rel=0.1))
    if residency in ("both", "one"):
        held = Teacher(files, residency=residency)
        for name in ("high", "low"):
            held.expert(name)
        weights = sum(
            tensor.numel() * 4 for network in held._read.values() for tensor in network.state_dict().values()
        )
        assert weights == pytest.approx(found[0], rel=0.01)


@pytest.mark.parametrize(
    "asked, width, gpu, bf16, chosen",
    [
        (None, 5120, True, True, "bf16"),
        (None, 5120, True, False, "no"),
        (None, 5120, False, True, "no"),
        (None, 128, True, True, "no"),
        ("no", 5120, True, True, "no"),
        ("fp16", 5120, True, True, "fp16"),
    ],
)
def test_a_large_teacher_computes_in_bf16_on_a_gpu_that_has_it_unless_asked_otherwise(
    asked, width, gpu, bf16, chosen, monkeypatch
):
    monkeypatch.setattr("wanlite.planning.estimate.has_gpu", lambda: gpu)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda including_emulation: bf16)
    assert (
        choose_precision(Settings(mixed_precision=asked), SimpleNamespace(width=width)).mixed_precision
        == chosen
    )


@pytest.mark.parametrize("said, is_there", [(None, True), ("false", True), ("true", False)])
def test_a_gpu_that_accelerate_is_told_to_leave_is_none(said, is_there, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    if said:
        monkeypatch.setenv("ACCELERATE_USE_CPU", said)
    assert has_gpu() == is_there


def test_the_largest_batch_that_fits_is_a_half_of_a_half():
    assert largest_batch(64, 10 + 3 * 64, 10, 60) == 16 and largest_batch(64, 100, 100, 60) == 0


@pytest.mark.parametrize("parameters, timed", [(100_000, 64), (10**6, 13), (10**7, 1), (5 * 10**7, 0)])
def test_the_time_is_told_by_a_step_of_few_operations(parameters, timed):
    asked = []  # how many states each pass has

    class Student(torch.nn.Module):
        def __init__(self, config):
            super().__init__()
            self.config, self.weight = config, torch.nn.Parameter(torch.ones(1))

        def num_parameters(self):
            return parameters

        def forward(self, latents, timestep, words, return_dict):
            asked.append(len(latents))
            return (latents * self.weight,)

    config = type("Config", (dict,), {"text_dim": 8, "num_channels": 4})()
    files = SimpleNamespace(num_parameters=10**9, experts={"only": None})
    said = estimate(Student(config), files, 60, 8, 256, (4, 4), torch.device("cpu"), torch.float32)
    assert set(asked) == ({timed} if timed else set()) and ("minutes" in said) == bool(timed)


# ---- the command -------------------------------------------------------------------------------------------


def size_of(text, place):
    number, unit = re.search(rf"([\d.,]+) (MB|GB)  {re.escape(str(place))} ", text).groups()
    return float(number.replace(",", "")) * {"MB": 1e6, "GB": 1e9}[unit]


def disk_used(folder, without=()):
    return sum(
        path.stat().st_size
        for path in folder.rglob("*")
        if path.is_file() and not set(without) & set(path.parts)
    )


def test_a_dry_run_tells_the_disk_that_the_run_took_and_writes_nothing(finished_run, tmp_path):
    process = run_script(TRAIN, "--dry_run", "--output_dir", tmp_path / "run", *SHORT_RUN)
    assert process.returncode == 0, process.stderr
    flags = f"--output_dir {tmp_path}/run {' '.join(SHORT_RUN)}"
    assert process.stdout.splitlines()[-1] == f"run      python train_distillation.py {flags}"
    assert not list(tmp_path.iterdir())
    told = size_of(process.stdout, tmp_path / "run" / "cache") - SPARE
    assert told == pytest.approx(disk_used(finished_run[0] / "cache"), rel=0.1)
    taken = disk_used(finished_run[0], without=("cache", "samples", "logs"))
    assert (
        taken < size_of(process.stdout, tmp_path / "run") < 1.8 * taken
    )  # a checkpoint more, each with a best student


def dry_run(folder, **settings):
    return plan(
        complete(
            Settings(output_dir=str(folder), num_trajectories=64, num_held_out=16, dry_run=True, **settings)
        ),
        [],
    )


def test_a_dry_run_counts_the_student_beside_the_teacher(tmp_path, capsys):
    """It stays on the device while the teacher walks: a larger student's weights are told there too."""
    told = []
    for width in (64, 128):
        assert dry_run(tmp_path / "run", hidden_size=width, feature_directions=16) == 0
        said = capsys.readouterr().out
        parameters = float(re.search(r"heads: ([\d.]+) M parameters", said)[1])
        told.append((parameters, float(re.search(r"([\d.]+) MB  trajectories", said)[1])))
    (few, lower), (many, higher) = told
    assert higher - lower == pytest.approx(4 * (many - few), abs=0.15)


def test_a_dry_run_refuses_a_student_that_the_run_refuses(finished_run, tmp_path):
    with pytest.raises(ValueError, match="--hidden_size 640 is more than the teacher's 128"):
        dry_run(tmp_path / "run", hidden_size=640)
    with pytest.raises(ValueError, match="--feature_directions 129 is more than the 128 of"):
        dry_run(tmp_path / "run", feature_directions=129)
    shutil.copytree(TINY_TEACHER, tmp_path / "teacher")
    path = tmp_path / "teacher/transformer/diffusion_pytorch_model.safetensors"
    save_file({name: tensor * 1.1 for name, tensor in load_file(path).items()}, path)
    with pytest.raises(ValueError, match="was distilled from another teacher"):
        dry_run(tmp_path / "run", student=str(finished_run[0]), teacher=str(tmp_path / "teacher"))


def told(folder, capsys, phase, **settings):
    """Return the MB that a dry run tells of a phase."""
    dry_run(folder, **settings)
    number, unit = re.search(rf"([\d.]+) (MB|GB)  {phase}", capsys.readouterr().out).groups()
    return float(number) * {"MB": 1, "GB": 1000}[unit]


def test_recomputing_blocks_is_told_to_take_less(tmp_path, capsys):
    kept, recomputed = (
        told(tmp_path, capsys, "training", train_batch_size=32, gradient_checkpointing=each)
        for each in (False, True)
    )
    assert recomputed < 0.8 * kept


def test_a_start_in_the_cache_needs_no_memory_again(tmp_path, capsys):
    assert told(tmp_path / "run", capsys, "start") > 1
    for made in ("start-0/report.json", "start-0/manifest.json"):
        path = tmp_path / "run/cache" / made
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        assert (told(tmp_path / "run", capsys, "start") == 0) == (path.name == "manifest.json")


def test_what_lies_on_the_disk_is_not_needed_again(tmp_path, monkeypatch):
    """Of 10 MB of cache and 5 of output, with 6 free: what lies in the cache, which is in the output, counts
    once.
    """
    monkeypatch.setattr("wanlite.planning.memory.free_disk", lambda folder: 6 * 10**6)
    cache, phases = (
        tmp_path / "run/cache",
        dict.fromkeys(("text", "trajectories", "training", "validation", "start"), 1),
    )

    def wrong():
        return report(
            phases, {cache: 10**7, tmp_path / "run": 5 * 10**6}, "cpu", 1, "both", {"both": (1, 0)}, 8, 1, 1
        )

    cache.mkdir(parents=True)
    (cache / "shard").write_bytes(bytes(8 * 10**6))
    assert wrong() == [
        f"the disk is too small: 7.0 MB are to be written in {cache}, 6.0 MB are free. Lower "
        f"--num_trajectories, or "
        "name a larger --cache_dir."
    ]
    (tmp_path / "run/step").write_bytes(bytes(10**6))
    assert not wrong()


def test_each_phase_that_does_not_fit_is_named(tmp_path):
    names = {
        "text": "text encoder",
        "trajectories": "passes",
        "training": "training",
        "validation": "validation",
        "start": "projecting",
        "matching": "distribution matching",
    }
    for large, word in names.items():
        phases = {name: 2 if name == large else 1 for name in names}
        found = report(phases, {tmp_path: 1}, "cpu", 1, "both", {"both": (1, 0)}, 8, 1, 1)
        assert len(found) == 1 and word in found[0]
    assert not report(dict.fromkeys(names, 1), {tmp_path: 1}, "cpu", 1, "both", {"both": (1, 0)}, 8, 1, 1)


@pytest.fixture(scope="module")
def a14b(tmp_path_factory):
    """The official folder of A14B, with every size real and zeros for weights, and of the text encoder only
    its length.
    """
    folder = tmp_path_factory.mktemp("real") / "Wan2.2-T2V-A14B"
    for name in ("high_noise_model", "low_noise_model"):
        write_sparse_wan(folder / name, A14B, "official", 6)
    torch.manual_seed(0)
    write_autoencoder(folder / "Wan2.1_VAE.pth", AutoencoderKLWan(base_dim=8))
    shutil.copytree(TINY_TEACHER / "tokenizer", folder / "google" / "umt5-xxl")
    with open(folder / "models_t5_umt5-xxl-enc-bf16.pth", "wb") as file:
        os.truncate(file.fileno(), 11_361_920_418 - 22)
        file.seek(0, os.SEEK_END)
        file.write(b"PK\5\6" + bytes(18))  # the end of a file of torch.save()
    return folder


def test_a_dry_run_of_a14b_tells_what_is_needed_and_what_does_not_fit(a14b):
    process = run_script(
        TRAIN,
        "--dry_run",
        "--mixed_precision",
        "bf16",
        "--train_batch_size",
        "100000",
        "--num_trajectories",
        "100000",
        cwd=a14b.parent,
    )
    assert process.returncode == 2
    said = process.stdout
    assert said.startswith(
        f"teacher  {a14b} (official layout, 2 expert(s): 14,288.49 M + 14,288.49 M parameters)\n"
    )
    assert "11.4 GB  text" in said and "PFLOP" in said
    assert re.search(
        r"PROBLEM  the disk is too small: [\d.,]+ GB are to be written in .*, [\d.,]+ GB are free", said
    )
    both, one, streamed = (
        float(re.search(rf"{place} ([\d.]+) GB", said)[1]) for place in ("both", "one", "streamed")
    )
    assert both - one == pytest.approx(28.58, abs=0.11)  # an expert in bfloat16
    assert one - streamed == pytest.approx(
        26.7, abs=0.2
    )  # of one, all but two blocks and what is in no block
    assert re.search(
        r"training does not fit: lower --train_batch_size to \d+ and raise --gradient_accumulation_steps to "
        r"\d+",
        said,
    )
    assert [path.name for path in a14b.parent.iterdir()] == [a14b.name]


def test_a_dry_run_names_all_that_is_wrong_at_once(a14b, tmp_path):
    shutil.copytree(a14b / "high_noise_model", tmp_path / "wan" / "high_noise_model", copy_function=os.link)
    (tmp_path / "wan" / "high_noise_model" / "config.json").unlink()
    process = run_script(
        TRAIN,
        "--dry_run",
        "--teacher",
        tmp_path / "wan",
        "--prompts",
        tmp_path / "none.txt",
        "--resolution",
        "100",
        "--max_train_steps",
        "0",
    )
    assert process.returncode == 2
    for words in (
        "lacks tokenizer",
        "text_encoder",
        "Wan2.1_VAE.pth",
        "none.txt: no such file",
        "--resolution 100 is not divisible",
        "--max_train_steps is 0",
        "low_noise_model/ is missing",
    ):
        assert words in process.stderr, words
