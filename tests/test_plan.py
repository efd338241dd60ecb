"""Predicted memory, disk and time agree with those of a run, and a dry run writes nothing."""

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
from wanlite.phases import count_steps
from wanlite.planning.disk import FolderSpace, measure_folders
from wanlite.planning.duration import Workload, describe_hours, estimate_duration
from wanlite.planning.hardware import choose_precision, fit_batch_size
from wanlite.planning.machines import planned_machine
from wanlite.planning.memory import (
    count_decoding_bytes,
    count_generation_bytes,
    count_initialization_bytes,
    count_pass_bytes,
    count_teacher_bytes,
    count_training_bytes,
    count_trajectory_bytes,
)
from wanlite.planning.report import MemoryReport, format_size
from wanlite.planning.resolutions import Resolution
from wanlite.planning.resolve import complete
from wanlite.planning.run import resolve_run
from wanlite.planning.simulation import MemoryMeter, extrapolate_depth, simulate_peak
from wanlite.runtime.devices import has_gpu
from wanlite.teacher.checkpoint import open_teacher_files
from wanlite.teacher.experts import PROBE_ROWS, PROBE_SIZE, check_experts
from wanlite.teacher.model import Teacher, run_expert, stream_expert
from wanlite.training.optimizers import make_optimizers
from wanlite.training.steps import MATCHED
from wanlite.training.teacher_data import teacher_velocity

TRAIN = ROOT / "train_distillation.py"


def alive(work):
    """Return the bytes alive at the peak of work that is done, not simulated."""
    with MemoryMeter() as meter:
        work()
    return meter.peak_bytes


def train(depth, peak, rate=0.01):
    settings = Settings(muon_learning_rate=rate)
    return count_training_bytes(
        lambda: WanLiteStudent(hidden_size=64, depth=depth, num_heads=2, text_dim=64),
        partial(make_optimizers, settings),
        lambda network: EMAModel(network.parameters()),
        4,
        (16, 16),
        False,
        peak,
    )


def test_the_meter_counts_tensors_that_are_alive_and_no_view_twice():
    def work():
        first = torch.zeros(1000)
        second = first.view(10, 100)[3:] + 1  # 700 more
        del first
        torch.zeros(500) + second.sum()  # 500 and 500, after 1000 are gone, beside one

    assert alive(work) == simulate_peak(work) == 4 * (700 + 1000 + 1)


def test_on_a_gpu_a_norm_keeps_only_its_input():
    def work():
        states = torch.ones(8, 32, 64, dtype=torch.bfloat16, requires_grad=True)
        return [
            functional.rms_norm(states, (64,), torch.ones(64, dtype=torch.bfloat16), 1e-6) for _ in range(3)
        ]

    expected = 2 * 4 * 8 * 32 * 64  # the input and three outputs
    assert simulate_peak(work, "cuda") == pytest.approx(expected, rel=0.06)
    assert simulate_peak(work) > 2.5 * expected
    on_cpu, on_gpu = (train(3, partial(simulate_peak, device_type=device)) for device in ("cpu", "cuda"))
    assert 0.7 * on_cpu < on_gpu < 1.01 * on_cpu  # the norms of the student keep little on a CPU, too


@pytest.mark.parametrize("rate", [0.0, 0.01])
def test_simulated_training_has_the_peak_of_training(rate):
    assert train(3, simulate_peak, rate) == pytest.approx(train(3, alive, rate), rel=0.02)


def test_training_a_large_student_on_a_gpu_keeps_its_norms_in_bfloat16():
    """32 states of 512 px on 1024 x 16: 40.4 GB counted by hand, and 45.9 with norms in float32."""

    def peak_of(depth):
        return count_training_bytes(
            lambda: WanLiteStudent(hidden_size=1024, depth=depth, num_heads=16, text_dim=4096),
            partial(make_optimizers, Settings()),
            lambda network: EMAModel(network.parameters()),
            32,
            (64, 64),
            True,
            partial(simulate_peak, device_type="cuda"),
        )

    assert extrapolate_depth(peak_of, 16) == pytest.approx(40.4e9, rel=0.02)


def test_the_peak_of_a_deep_student_is_extrapolated_from_two_shallow_ones():
    assert extrapolate_depth(partial(train, peak=simulate_peak), 9) == pytest.approx(
        train(9, simulate_peak), rel=0.01
    )


def test_a_simulated_pass_has_the_peak_of_the_tiny_teachers_pass(teacher, prompt_embeddings):
    files = open_teacher_files(TINY_TEACHER)
    text = pack_text([torch.zeros(63, 64)] * 8)  # 64 tokens, one of them the padding's
    latents, timestep = torch.zeros(8, 16, 8, 8), torch.full((8,), 990.0)
    expert = teacher.expert("high")
    with torch.no_grad():
        real = alive(lambda: run_expert(expert, latents, timestep, text))
    predicted = count_pass_bytes(files, 8, (8, 8), torch.float32)
    inputs = sum(
        tensor.numel() * 4 for tensor in (latents, timestep, *text)
    )  # only the simulation makes them
    assert predicted - inputs == pytest.approx(real, rel=0.1)


@pytest.mark.parametrize(
    "tokens_at_once, steps", [(256, 2), (256, 20), (10**6, 6)], ids=["hidden states", "results", "a pass"]
)
def test_generating_has_the_predicted_peak(tokens_at_once, steps, tmp_path):
    """The peak is where hidden states of many passes are joined, where results are, or in a pass."""
    files, count, width = open_teacher_files(TINY_TEACHER), 16, 32
    few = Teacher(files, tokens_at_once=tokens_at_once)
    few.expert("high"), few.expert("low")
    velocity_for = teacher_velocity(few, Settings(), torch.zeros(63, 64))
    text = pack_text([torch.zeros(63, 64)] * count)
    trajectory_generator = TrajectoryGenerator(
        Accelerator(),
        lambda prompts, has_features: velocity_for(text, has_features),
        make_scheduler(3.0),
        steps,
        basis=torch.zeros(files.width, width),
    )
    trajectories = [(number, "", number) for number in range(count)]
    real = alive(lambda: trajectory_generator.generate(tmp_path, trajectories, (16, 16, 16)))
    pass_bytes = count_pass_bytes(files, min(2 * count, tokens_at_once // 64), (16, 16), torch.float32)
    result_bytes = count_trajectory_bytes(count, steps, (16, 16, 16), 64, width, is_stored=False)
    predicted = count_generation_bytes(pass_bytes, count * 64 * files.width, torch.float32, result_bytes)
    assert predicted == pytest.approx(real, rel=0.1)


def test_comparing_and_calibrating_have_the_predicted_peaks():
    files, probe = open_teacher_files(TINY_TEACHER), (PROBE_ROWS, PROBE_SIZE)
    real = alive(lambda: check_experts(files))
    comparing, calibrating = count_initialization_bytes(files, probe, 16, (24, 24))
    assert comparing == pytest.approx(real, rel=0.12)
    assert alive(lambda: stream_expert(files.experts["high"])) < calibrating
    more = count_initialization_bytes(files, probe, 32, (24, 24))[1] - calibrating
    assert more == pytest.approx(count_pass_bytes(files, 16, (24, 24), torch.float32), rel=0.1)
    assert count_initialization_bytes(files, probe, 0, (8, 8)) == (comparing, 0)


def test_simulated_decoding_has_the_peak_of_decoding():
    autoencoder, latents = load_autoencoder(TINY_TEACHER), torch.zeros(64, 16, 8, 8)
    real = alive(lambda: decode_latents(autoencoder, latents))
    weights = sum(tensor.numel() * 4 for tensor in autoencoder.state_dict().values())
    make = partial(make_autoencoder, autoencoder.config)
    predicted = count_decoding_bytes(make, decode_latents, 64, (16, 8, 8))
    assert predicted == pytest.approx(real + weights + latents.numel() * 4, rel=0.1)


@pytest.mark.parametrize(
    "residency, on_device, on_cpu", [("both", 2, 0), ("one", 1, 2), ("streamed", 0.6, 2.1), ("disk", 0.52, 0)]
)
def test_the_bytes_of_a_teacher_follow_its_residency(residency, on_device, on_cpu):
    files = open_teacher_files(TINY_TEACHER)
    size = 4 * files.num_parameters / 2
    predicted = count_teacher_bytes(files, residency, torch.float32, False)
    assert predicted == (pytest.approx(on_device * size, rel=0.1), pytest.approx(on_cpu * size, rel=0.1))
    if residency in ("both", "one"):
        teacher = Teacher(files, residency=residency)
        for name in ("high", "low"):
            teacher.expert(name)
        tensors = [tensor for expert in teacher._read.values() for tensor in expert.state_dict().values()]
        assert sum(tensor.numel() * 4 for tensor in tensors) == pytest.approx(predicted[0], rel=0.01)


@pytest.mark.parametrize(
    "requested, width, gpu, bf16, chosen",
    [
        (None, 5120, True, True, "bf16"),
        (None, 5120, True, False, "no"),
        (None, 5120, False, True, "no"),
        (None, 128, True, True, "no"),
        ("no", 5120, True, True, "no"),
        ("fp16", 5120, True, True, "fp16"),
    ],
)
def test_a_large_teacher_defaults_to_bf16_on_a_gpu_that_supports_it(
    requested, width, gpu, bf16, chosen, monkeypatch
):
    monkeypatch.setattr("wanlite.planning.hardware.has_gpu", lambda: gpu)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda including_emulation: bf16)
    settings = choose_precision(Settings(mixed_precision=requested), SimpleNamespace(width=width))
    assert settings.mixed_precision == chosen


@pytest.mark.parametrize(
    "requested, width, gpu, has_compiler, expected",
    [
        (None, 5120, True, True, True),
        (None, 5120, True, False, False),
        (None, 5120, False, True, False),
        (None, 128, True, True, False),
        (False, 5120, True, True, False),
        (True, 128, False, True, True),
    ],
)
def test_blocks_are_compiled_on_a_gpu_with_a_large_teacher_by_default(
    requested, width, gpu, has_compiler, expected, monkeypatch
):
    monkeypatch.setattr("wanlite.planning.hardware.has_gpu", lambda: gpu)
    monkeypatch.setattr("wanlite.planning.hardware.has_compiler", lambda: has_compiler)
    monkeypatch.setattr("wanlite.planning.hardware.find_spec", lambda name: name)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda including_emulation: True)
    settings = choose_precision(Settings(compile=requested), SimpleNamespace(width=width))
    assert settings.compile is expected


@pytest.mark.parametrize("use_cpu, expected", [(None, True), ("false", True), ("true", False)])
def test_a_gpu_is_not_used_if_accelerate_is_set_to_the_cpu(use_cpu, expected, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    if use_cpu:
        monkeypatch.setenv("ACCELERATE_USE_CPU", use_cpu)
    assert has_gpu() == expected


def test_a_batch_is_halved_until_it_fits():
    assert fit_batch_size(64, 10 + 3 * 64, 10, 60) == 16 and fit_batch_size(64, 100, 100, 60) == 0


@pytest.mark.parametrize("parameters, timed", [(100_000, 64), (10**6, 13), (10**7, 1), (5 * 10**7, 0)])
def test_a_small_student_is_timed_on_a_batch_of_few_operations(parameters, timed):
    batch_sizes = []

    class Student(torch.nn.Module):
        def __init__(self, config):
            super().__init__()
            self.config, self.weight = config, torch.nn.Parameter(torch.ones(1))

        def num_parameters(self):
            return parameters

        def forward(self, latents, timestep, text, return_dict):
            batch_sizes.append(len(latents))
            return (latents * self.weight,)

    config = type("Config", (dict,), {"text_dim": 8, "num_channels": 4})()
    files = SimpleNamespace(num_parameters=10**9, experts={"only": None})
    work = Workload(
        Student(config), files, 60 * 256, 8 * 256, Resolution((64, 64), [], (4, 4, 4), [], tokens=256)
    )
    text = estimate_duration(work, torch.device("cpu"), torch.float32)
    assert set(batch_sizes) == ({timed} if timed else set()) and ("PFLOP" in text) != bool(timed)


# ---- the command -------------------------------------------------------------------------------------------


def size_of(text, folder):
    number, unit = re.search(rf"([\d.,]+) (MB|GB)  {re.escape(str(folder))} ", text).groups()
    return float(number.replace(",", "")) * {"MB": 1e6, "GB": 1e9}[unit]


def disk_used(folder, without=()):
    return sum(
        path.stat().st_size
        for path in folder.rglob("*")
        if path.is_file() and not set(without) & set(path.parts)
    )


def test_a_dry_run_predicts_the_disk_of_the_run_and_writes_nothing(finished_run, tmp_path):
    process = run_script(TRAIN, "--dry_run", "--output_dir", tmp_path / "run", *SHORT_RUN)
    assert process.returncode == 0, process.stderr
    flags = f"--output_dir {tmp_path}/run {' '.join(SHORT_RUN)}"
    assert process.stdout.splitlines()[-1] == f"run      python train_distillation.py {flags}"
    assert not list(tmp_path.iterdir())
    predicted = size_of(process.stdout, tmp_path / "run" / "cache") - SPARE
    assert predicted == pytest.approx(disk_used(finished_run[0] / "cache"), rel=0.1)
    used = disk_used(finished_run[0], without=("cache", "samples", "logs"))
    predicted = size_of(process.stdout, tmp_path / "run")
    assert used < predicted < 1.8 * used  # one more checkpoint, and each with a best student


def dry_run(folder, **settings):
    return plan(
        complete(
            Settings(output_dir=str(folder), num_trajectories=64, num_held_out=16, dry_run=True, **settings)
        ),
        [],
    )


def test_a_predicted_time_mentions_teacher_images_in_the_cache(finished_run, tmp_path, capsys):
    for cache, is_cached in ((tmp_path / "cache", False), (finished_run[0] / "cache", True)):
        dry_run(tmp_path / "run", cache_dir=str(cache), hidden_size=32, depth=1, num_heads=2)
        (time,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("time "))
        assert ("less for teacher images that are in the cache" in time) == is_cached


def test_a_dry_run_counts_the_student_beside_the_teacher(tmp_path, capsys):
    """The student stays on the device while trajectories are generated: a larger one needs more memory then."""
    predicted = []
    for width in (64, 128):
        assert dry_run(tmp_path / "run", hidden_size=width, feature_directions=16) == 0
        output = capsys.readouterr().out
        parameters = float(re.search(r"student  ([\d.]+) million parameters", output)[1])
        predicted.append((parameters, float(re.search(r"([\d.]+) MB  trajectories", output)[1])))
    (few, lower), (many, higher) = predicted
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


def predict_megabytes(folder, capsys, phase, **settings):
    """Return the MB that a dry run predicts for a phase."""
    dry_run(folder, **settings)
    number, unit = re.search(rf"([\d.]+) (MB|GB)  {phase}", capsys.readouterr().out).groups()
    return float(number) * {"MB": 1, "GB": 1000}[unit]


def test_gradient_checkpointing_lowers_the_predicted_memory(tmp_path, capsys):
    without, recomputed = (
        predict_megabytes(tmp_path, capsys, "training", train_batch_size=32, gradient_checkpointing=is_on)
        for is_on in (False, True)
    )
    assert recomputed < 0.8 * without


def test_a_projected_student_in_the_cache_needs_no_memory_for_its_projection(tmp_path, capsys):
    assert predict_megabytes(tmp_path / "run", capsys, "start") > 1
    for name in ("start-0/report.json", "start-0/manifest.json"):
        path = tmp_path / "run/cache" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        predicted = predict_megabytes(tmp_path / "run", capsys, "start")
        assert (predicted == 0) == (path.name == "manifest.json")


PROBLEMS = {  # {phase: words of its problem}
    "text": "text encoder",
    "trajectories": "passes",
    "training": "training",
    "validation": "validation",
    "start": "projection",
    "matching": "distribution matching",
}


def make_report(phases, folders):
    """Return the MemoryReport of a run, with one byte free on the device."""
    return MemoryReport(
        settings=Settings(teacher_residency="both", train_batch_size=8, gradient_accumulation_steps=1),
        device="cpu",
        free_bytes=1,
        base_bytes=1,
        phases=phases,
        residencies={"both": (1, 0)},
        folders=folders,
    )


def test_existing_files_are_not_written_again_and_count_for_one_folder(tmp_path, monkeypatch):
    """10 MB of cache, inside an output of 5 MB, on one disk with 6 MB free."""
    monkeypatch.setattr("wanlite.planning.disk.count_free_bytes", lambda folder: 6 * 10**6)
    cache = tmp_path / "run/cache"

    def find_problems():
        folders = measure_folders({cache: 10**7, tmp_path / "run": 5 * 10**6})
        return make_report(dict.fromkeys(PROBLEMS, 1), folders).find_problems()

    cache.mkdir(parents=True)
    (cache / "shard").write_bytes(bytes(8 * 10**6))
    assert find_problems() == [
        f"the disk is too small: {cache} needs 7.0 MB more, and 6.0 MB are free. Lower --num_trajectories, or "
        "name a larger --cache_dir."
    ]
    (tmp_path / "run/step").write_bytes(bytes(10**6))
    assert not find_problems()


def test_a_report_has_a_line_for_each_phase_and_each_folder():
    phases = dict.fromkeys(PROBLEMS, 2 * 10**9)
    assert make_report(phases, {"out": FolderSpace(3 * 10**6, 10**6, 5 * 10**9)}).describe() == [
        "memory   0.0 MB free on cpu",
        *(f"      2.0 GB  {phase}" for phase in PROBLEMS),
        "experts  both; trajectories by --teacher_residency: both 2.0 GB",
        "disk",
        "      3.0 MB  out (1.0 MB exist, 5.0 GB free)",
    ]


def test_each_phase_that_does_not_fit_is_named(tmp_path):
    folders = {tmp_path: FolderSpace(1, 0, 1)}
    for large, words in PROBLEMS.items():
        phases = {name: 2 if name == large else 1 for name in PROBLEMS}
        (problem,) = make_report(phases, folders).find_problems()
        assert words in problem
    assert not make_report(dict.fromkeys(PROBLEMS, 1), folders).find_problems()


@pytest.fixture(scope="module")
def a14b(tmp_path_factory):
    """The official folder of A14B in its real sizes, with zeros for weights and an empty text encoder."""
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


def table_of_readme():
    """Return the cells of each row of the README's table of hardware."""
    rows = re.findall(r"^\| (\d+GB,\d+GB) \|(.*)\|$", (ROOT / "README.md").read_text(), re.MULTILINE)
    return [(machine, *(cell.strip() for cell in cells.split("|"))) for machine, cells in rows]


@pytest.mark.parametrize("row", table_of_readme(), ids=lambda row: row[0])
def test_the_hardware_in_the_readme_is_planned_so(row, a14b, tmp_path):
    machine, experts, generate, train, cpu, disk, time = row
    settings = Settings(teacher=str(a14b), output_dir=str(tmp_path), dry_run=True, plan_for=machine)
    run = resolve_run(complete(settings), WanLiteStudent)
    report = run.estimator.make_report(run.settings, run.training, run.held_out, 0)
    residency = {"streamed": "streamed", "read": "disk", "one": "one", "both": "both"}[experts.split()[0]]
    assert run.settings.teacher_residency == residency and report.find_problems() == []
    assert format_size(report.phases["trajectories"]) == generate
    batch = f"(micro-batches of {run.settings.train_batch_size})"
    assert f"{format_size(report.phases['training'])} {batch}" == train
    cpu_bytes = report.residencies[residency][1]
    assert (format_size(cpu_bytes) if cpu_bytes else "-") == cpu
    assert f"{sum(space.needed_bytes for space in report.folders.values()) / 1e9:.0f} GB" == disk
    assert run.estimate_time().split(" hours")[0] == time.split(" H100")[0]


@pytest.mark.parametrize(
    "settings, phases",
    [
        ({}, {"velocity": 5100, "few_step": 500}),  # 16 passes over 4,000 images, in batches of 128
        ({"teacher": "emoji"}, {"velocity": 900, "few_step": 500}),
        ({"teacher": "tiny"}, {"velocity": 400, "few_step": 1000}),  # captions determine images
        ({"num_trajectories": 500}, {"velocity": 5300, "few_step": 300}),  # not less
        ({"budget": "day"}, {"velocity": 35_000, "few_step": 1000}),  # over the 8,000 of the last size
        ({"train_batch_size": 64}, {"velocity": 4600, "few_step": 1000}),
        ({"max_train_steps": 200}, {"velocity": 57, "few_step": 143}),  # five sevenths
        ({"few_step_train_steps": 4000}, {"velocity": 1600, "few_step": 4000}),
        ({"few_step_train_steps": 0}, {"velocity": 5600}),
    ],
)
def test_the_few_step_phase_passes_16_times_over_its_images(settings, phases, a14b, tmp_path):
    defaults = {"teacher": str(a14b), "dry_run": True, "plan_for": "80GB,256GB"}
    run = resolve_run(complete(Settings(output_dir=str(tmp_path), **defaults | settings)), WanLiteStudent)
    assert {name: count for name, count in count_steps(run.phases).items() if count} == phases


@pytest.mark.parametrize(
    "hours, text",
    [
        (0, "about a minute"),
        (1 / 60, "about a minute"),
        (0.5, "about 30 minutes"),
        (1.4, "about 84 minutes"),
        (4.7, "about 5 hours"),
        (40, "about 2 days"),
        (400, "about 2 weeks"),
        (2000, "about 3 months"),
        (1e6, "about 114 years"),
    ],
)
def test_durations_are_in_units_that_people_use(hours, text):
    assert describe_hours(hours) == text


@pytest.mark.parametrize(
    "text", ["", "24", "24GB,", f"{'9' * 400}GB", "0GB", "24GB,64GB,1GB", "GB", "24 TB", "-24GB", "24GB;64GB"]
)
def test_a_machine_without_sizes_is_refused(text):
    with pytest.raises(ValueError, match="expected the memory of its GPU, and optionally its CPU memory"):
        complete(Settings(dry_run=True, plan_for=text))


def test_the_critic_needs_the_memory_of_training_on_its_batch(tmp_path):
    settings = complete(
        Settings(teacher=str(TINY_TEACHER), output_dir=str(tmp_path), dry_run=True, matching_steps=10)
    )
    run = resolve_run(settings, WanLiteStudent)
    estimator, batch_size = run.estimator, 64
    training, critic = (
        estimator.training_bytes(run.settings, count) for count in (batch_size, batch_size // MATCHED)
    )
    teacher = estimator.generation_bytes(run.settings) - estimator.autoencoder_bytes
    found = estimator.matching_bytes(run.settings, batch_size)
    assert found == pytest.approx(training + critic + teacher, rel=0.02)


def test_a_machine_to_plan_for_needs_a_dry_run():
    with pytest.raises(ValueError, match="--plan_for 24GB plans for another machine. Add --dry_run"):
        complete(Settings(plan_for="24GB"))
    assert planned_machine("24GB, 64 gb") == (24 * 10**9, 64 * 10**9) == planned_machine("24G,64GiB")


def test_the_plan_for_another_machine_ends_with_the_command_for_it(tmp_path):
    process = run_script(TRAIN, "--dry_run", "--plan_for", "8GB", "--output_dir", tmp_path / "out")
    assert process.returncode == 0, process.stderr
    assert "device   a machine of --plan_for 8GB, float32" in process.stdout
    assert "memory   8.0 GB on the GPU of --plan_for" in process.stdout
    assert process.stdout.endswith(f"run      python train_distillation.py --output_dir {tmp_path / 'out'}\n")


def test_a_dry_run_of_a14b_prints_its_memory_and_its_problems(a14b):
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
    output = process.stdout
    assert output.startswith(
        f"teacher  {a14b}\n         official layout, 2 experts of 14.29 billion parameters\n"
    )
    assert "11.4 GB  text" in output and "PFLOP" in output
    assert re.search(
        r"PROBLEM  the disk is too small: .* needs [\d.,]+ GB more, and [\d.,]+ GB are free", output
    )
    both, one, streamed = (
        float(re.search(rf"{residency} ([\d.]+) GB", output)[1]) for residency in ("both", "one", "streamed")
    )
    assert both - one == pytest.approx(28.58, abs=0.11)  # an expert in bfloat16
    assert one - streamed == pytest.approx(26.7, abs=0.2)  # the blocks of an expert but two
    assert re.search(
        r"training does not fit: lower --train_batch_size to \d+ and raise --gradient_accumulation_steps to "
        r"\d+",
        output,
    )
    assert [path.name for path in a14b.parent.iterdir()] == [a14b.name]


def test_a_dry_run_lists_all_errors_at_once(a14b, tmp_path):
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
