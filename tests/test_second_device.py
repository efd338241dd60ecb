"""All tensors of a run are on its device: three phases, images and inference on a device that rejects
mixing.
"""

import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.utils import backend_registration

from tests.conftest import ROOT
from tests.test_images import write_folder
from wanlite.generation.student import StudentPipeline

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
        reason="this torch does not support devices written in Python",
    ),
]
SHORT_RUN = [
    "--num_trajectories=8",
    "--num_held_out=6",
    "--train_batch_size=8",
    "--max_train_steps=6",
    "--few_step_train_steps=2",
    "--matching_steps=2",
    "--validation_steps=6",
    "--validation_trajectories=4",
    "--rollout_states=4",
    "--teacher_steps=2",
    "--few_steps",
    "1",
    "2",
    "--num_inference_steps=2",
    "--aspect_ratios",
    "1:1",
    "3:2",
]
SECOND_DEVICE, WEIGHTS = ROOT / "tests" / "second_device.py", "diffusion_pytorch_model.safetensors"
PROMPTS = ["a small red ring on a white background", "a large blue cross on a grey background"]
GENERATES = f"""import sys
sys.path.insert(0, "{{root}}")
import numpy
from wanlite.generation import student
for name, free in (("there", 1e12), ("beside", 1)):
    student.free_memory = lambda device: (free, free)
    pipeline = student.StudentPipeline("{{run}}", "second:0")
    numpy.save("{{folder}}/" + name + ".npy", pipeline.generate({PROMPTS}, range(2), 2, 64, 96))
"""
LOADS = f"""import sys
sys.path.insert(0, "{ROOT}")
import torch
import weakref
from wanlite.teacher.model import Teacher
from wanlite.teacher.checkpoint import open_teacher_files
on_device, alive, peaks = type(torch.zeros(1, device="second:0")), {{}}, []
make = on_device.__new__
def watched(cls, numbers):
    place, key = numbers.untyped_storage().data_ptr(), id(numbers)
    references, _ = alive.setdefault(place, (set(), numbers.untyped_storage().nbytes()))
    references.add(key)
    weakref.finalize(numbers, lambda: (references.discard(key), references or alive.pop(place, None)))
    peaks.append(sum(size for _, size in alive.values()))
    return make(cls, numbers)
on_device.__new__ = staticmethod(watched)
files = open_teacher_files("{ROOT / "tiny_teacher"}")
expert = Teacher(files, torch.device("second:0"), torch.float32, "both", is_fp8=True).expert("high")
print(max(peaks), sum(weight.nbytes for weight in expert.parameters()), 4 * files.experts["high"].num_parameters)
torch.zeros(2, device="second:0") + torch.zeros(2)
"""
SWAPS = f"""import sys
sys.path.insert(0, "{ROOT}")
import torch
from wanlite.network import pack_text
from wanlite.teacher.model import Teacher
from wanlite.teacher.checkpoint import open_teacher_files
files, latents = open_teacher_files("{ROOT / "tiny_teacher"}"), torch.randn(2, 16, 8, 8)
def compute_velocity(teacher, device):
    text = pack_text([torch.ones(3, 64)] * 2).to(device)
    return torch.stack([teacher.velocity(latents.to(device), torch.full((2,), level, device=device), text)[0].cpu()
                        for level in (990.0, 20.0, 980.0)])
is_fp8 = sys.argv[1] == "fp8"
swapped = Teacher(files, torch.device("second:0"), torch.float32, "one", is_fp8)
swapped.expert("low"), swapped.expert("high")
kept = {{name: weight.data_ptr() for name, weight in swapped._read["low"].named_parameters()}}
print((compute_velocity(swapped, "second:0") - compute_velocity(Teacher(files, is_fp8=is_fp8), "cpu")).abs().max().item())
print({{name: {{weight.device.type for weight in expert.parameters()}} for name, expert in swapped._read.items()}})
print(kept == {{name: weight.data_ptr() for name, weight in swapped._read["low"].named_parameters()}})
"""


def on_second_device(script, *arguments):
    return subprocess.run([sys.executable, SECOND_DEVICE, script, *arguments], capture_output=True, text=True)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("devices")
    write_folder(folder / "images")
    for device, start in (("second:0", [SECOND_DEVICE]), ("cpu", [])):
        printed = subprocess.run(
            [
                sys.executable,
                *start,
                ROOT / "train_distillation.py",
                f"--output_dir={folder / device}",
                f"--images={folder / 'images'}",
                *SHORT_RUN,
            ],
            capture_output=True,
            text=True,
        )
        assert printed.returncode == 0, printed.stderr[-3000:]
        assert f"device   {device}" in printed.stdout
    return folder / "second:0", folder / "cpu"


def test_every_phase_trains_to_the_student_of_the_cpu(runs):
    """Except for rounding, training on the device equals training on the CPU."""
    there, here = (
        torch.cat([weight.flatten() for _, weight in sorted(load_file(run / WEIGHTS).items())])
        for run in runs
    )
    (start,) = runs[1].glob("cache/start-*")
    began = torch.cat([weight.flatten() for _, weight in sorted(load_file(start / WEIGHTS).items())])
    assert (there - here).norm() < 0.1 * (here - began).norm()


def test_a_student_generates_the_images_of_the_cpu(runs, tmp_path):
    script = tmp_path / "draws.py"
    script.write_text(GENERATES.format(root=ROOT, run=runs[1], folder=tmp_path))
    printed = on_second_device(script)
    assert printed.returncode == 0, printed.stderr[-3000:]
    # Little memory was free the second time.
    assert printed.stdout == "the text encoder does not fit on second:0 and runs on the CPU\n"
    generated = StudentPipeline(runs[1], "cpu").generate(PROMPTS, range(2), 2, 64, 96)
    for name in ("there", "beside"):
        assert np.abs(np.load(tmp_path / f"{name}.npy").astype(int) - generated).max() <= 1


def test_a_float8_expert_stays_in_float8_and_mixed_devices_are_refused(tmp_path):
    script = tmp_path / "loads.py"
    script.write_text(LOADS)
    printed = on_second_device(script)
    peak, held, in_float32 = map(int, printed.stdout.split())
    assert held <= peak < 1.3 * held < 0.5 * in_float32
    assert printed.stderr.splitlines()[-1].startswith(
        "RuntimeError: Expected all tensors to be on the same device, but add "
    )


@pytest.mark.parametrize("storage", ["float32", "fp8"])
def test_the_unused_expert_of_two_stays_in_its_place_on_the_cpu(storage, tmp_path):
    script = tmp_path / "swaps.py"
    script.write_text(SWAPS)
    printed = on_second_device(script, storage)
    apart, places, is_where_it_was = printed.stdout.splitlines()
    assert (
        float(apart) < 1e-4 and places == "{'low': {'cpu'}, 'high': {'second'}}" and is_where_it_was == "True"
    )
