"""The complete workflow: train, save, delete the teacher, load in a fresh process, generate the same
image. Loading never projects: the teacher is not available at that point.
"""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from diffusers import WanPipeline, WanTransformer3DModel
from PIL import Image
from safetensors.torch import load_file

from tests.conftest import ROOT, SHORT_RUN, TINY_TEACHER, start_script, write_official
from train_distillation import WanLiteStudent
from wanlite.flow import seeded_noise

PROMPTS = ["a small red circle at the left on a white background", "at the top, a large blue ring on black"]
WEIGHTS = "diffusion_pytorch_model.safetensors"
TRAIN, GENERATE = ROOT / "train_distillation.py", ROOT / "run_inference.py"


@pytest.fixture(scope="module")
def orphan(tmp_path_factory):
    """A run whose teacher was deleted after training."""
    folder = tmp_path_factory.mktemp("orphan")
    shutil.copytree(TINY_TEACHER, folder / "teacher")
    process = start_script(TRAIN, "--teacher", folder / "teacher", "--output_dir", folder / "run", *SHORT_RUN)
    assert process.returncode == 0, process.stderr
    shutil.rmtree(folder / "teacher")
    return folder / "run"


def weights(folder):
    return load_file(folder / WEIGHTS)


def are_equal(first, second):
    return first.keys() == second.keys() and all(
        torch.equal(tensor, second[name]) for name, tensor in first.items()
    )


def generate(folder, output, *arguments):
    prompts = [word for prompt in PROMPTS for word in ("--prompt", prompt)]
    process = start_script(GENERATE, "--model", folder, "--output_dir", output, *prompts, *arguments)
    assert process.returncode == 0, process.stderr
    return [np.array(Image.open(path)) for path in sorted(output.glob("0*.png"))]


def test_a_run_saves_the_documented_files(orphan):
    for name in (
        "config.json",
        "diffusion_pytorch_model.safetensors",
        "run.json",
        "metrics.jsonl",
        "report.html",
        "README.md",
        "model_index.json",
        "scheduler/scheduler_config.json",
        "tokenizer/tokenizer.json",
        "text_encoder/config.json",
        "vae/config.json",
        "checkpoints/step-000003/manifest.json",
        "samples/step-000006.png",
    ):
        assert (orphan / name).is_file(), name
    assert "teacher" not in (orphan / "config.json").read_text()
    run = json.loads((orphan / "run.json").read_text())
    assert (
        run["finished"]
        and run["settings"]["seed"] == 0
        and len(run["teacher"]) == 64
        and run["versions"]["torch"]
    )


def test_saved_weights_are_the_averages_of_the_last_step_in_every_tensor(orphan):
    saved, state = weights(orphan), load_file(orphan / "checkpoints/step-000006/state.safetensors")
    names = [name for name, _ in WanLiteStudent.from_pretrained(orphan).named_parameters()]
    averages = [state[f"/ema/shadow_params/{number}"] for number in range(len(names))]
    for number in (0, len(names) // 2, len(names) - 1, *range(len(names))):
        assert torch.equal(saved[names[number]], averages[number]), names[number]
    assert saved.keys() == set(names) and not are_equal(
        saved, {name: state[f"/student/{name}"] for name in names}
    )


def velocity(student):
    """Return the digest of a student's velocity for fixed noise and text."""
    latents, text = seeded_noise((16, 8, 8), [1, 2]), seeded_noise((9, 64), [3, 4])
    with torch.no_grad():
        found = [
            student(latents, torch.full((2,), timestep), text).sample for timestep in (999.0, 500.0, 3.0)
        ]
    return hashlib.sha256(torch.stack(found).numpy().tobytes()).hexdigest()


def test_a_student_loads_in_a_fresh_process_without_teacher_and_projection(orphan):
    code = (
        "import sys, hashlib; sys.path.insert(0, sys.argv[1])\n"
        "import train_distillation\n"
        "from wanlite.student import initialization, projection\n"
        "from wanlite.teacher import checkpoint as teacher_files, model as teacher\n"
        "def forbidden(*a, **k): raise AssertionError('loading touched a teacher')\n"
        "for module, name in ((projection, 'project'), (initialization, 'project_into'), (train_distillation, "
        "'project_into'),\n"
        "                   (teacher_files, 'open_teacher_files'), (initialization, 'open_teacher_files'), (teacher, "
        "'load_expert')):\n"
        "    getattr(module, name); setattr(module, name, forbidden)\n"
        "student = train_distillation.WanLiteStudent.from_pretrained(sys.argv[2])\n"
        "assert not any(t.is_meta for t in (*student.parameters(), *student.buffers())) and not "
        "student.training\n"
        "for name, tensor in sorted(student.state_dict().items()):\n"
        "    print(name, hashlib.sha256(tensor.numpy().tobytes()).hexdigest())\n"
        "from test_save_load_integration import velocity; print(velocity(student))\n"
    )
    process = start_script("-c", code, ROOT, orphan)
    assert process.returncode == 0, process.stderr
    expected = [
        f"{name} {hashlib.sha256(tensor.numpy().tobytes()).hexdigest()}"
        for name, tensor in sorted(weights(orphan).items())
    ]
    assert process.stdout.splitlines() == [*expected, velocity(WanLiteStudent.from_pretrained(orphan))]


@pytest.mark.parametrize("dtype", [None, "float32", "bfloat16", "float16"])
def test_saving_and_loading_again_changes_no_bit_and_no_velocity(dtype, orphan, tmp_path):
    first = WanLiteStudent.from_pretrained(orphan, dtype=dtype)
    first.save_pretrained(tmp_path / "copy")
    second = WanLiteStudent.from_pretrained(tmp_path / "copy")
    assert are_equal(first.state_dict(), second.state_dict()) and are_equal(
        first.state_dict(), weights(tmp_path / "copy")
    )
    assert [t.dtype for t in first.parameters()] == [t.dtype for t in second.parameters()]
    if dtype in (None, "float32"):
        assert (
            velocity(first) == velocity(second)
            and (tmp_path / "copy" / WEIGHTS).read_bytes() == (orphan / WEIGHTS).read_bytes()
        )


def test_a_student_loaded_and_saved_again_generates_the_same_image(orphan, tmp_path):
    shutil.copytree(orphan, tmp_path / "run", ignore=shutil.ignore_patterns("cache", "checkpoints"))
    WanLiteStudent.from_pretrained(orphan).save_pretrained(tmp_path / "run", max_shard_size="500KB")
    assert len(list((tmp_path / "run").glob("*.safetensors"))) > 2
    images = [
        generate(folder, tmp_path / name, "--seed", "5")
        for folder, name in ((orphan, "one"), (tmp_path / "run", "two"))
    ]
    assert all(np.array_equal(one, two) for one, two in zip(*images))


def test_run_inference_generates_the_images_of_a_stock_pipeline(orphan, tmp_path):
    images = generate(orphan, tmp_path / "ours", "--seed", "5")
    pipeline = WanPipeline.from_pretrained(orphan, transformer=WanTransformer3DModel.from_pretrained(orphan))
    frames = pipeline(
        PROMPTS,
        height=64,
        width=64,
        num_frames=1,
        guidance_scale=1.0,
        num_inference_steps=4,
        latents=seeded_noise((16, 1, 8, 8), [5, 6]),
        output_type="np",
    ).frames[:, 0]
    for ours, theirs in zip(images, frames):
        assert np.abs(ours.astype(float) - (theirs * 255).round()).max() <= 1


def test_a_pipeline_saved_with_a_student_loads_and_generates_the_same_images(orphan, tmp_path):
    def generate_with(pipeline):
        return pipeline(
            PROMPTS,
            height=64,
            width=64,
            num_frames=1,
            guidance_scale=1.0,
            num_inference_steps=4,
            latents=seeded_noise((16, 1, 8, 8), [5, 6]),
            output_type="np",
        ).frames

    pipeline = WanPipeline.from_pretrained(orphan, transformer=WanLiteStudent.from_pretrained(orphan))
    pipeline.save_pretrained(tmp_path / "pipeline")
    again = WanPipeline.from_pretrained(tmp_path / "pipeline")
    assert type(again.transformer) is WanTransformer3DModel and np.array_equal(
        generate_with(pipeline), generate_with(again)
    )
    half = WanPipeline.from_pretrained(tmp_path / "pipeline", torch_dtype=torch.bfloat16, device_map="cpu")
    assert (
        half.transformer.dtype == half.vae.dtype == torch.bfloat16 and np.isfinite(generate_with(half)).all()
    )


def test_the_metadata_of_an_image_generate_it_again(orphan, tmp_path):
    generate(
        orphan, tmp_path / "once", "--seed", "9", "--num_images_per_prompt", "2", "--num_inference_steps", "2"
    )
    original = Image.open(sorted((tmp_path / "once").glob("0*.png"))[3])
    facts = original.text
    assert facts["prompt"] == PROMPTS[1] and facts["seed"] == "12" and len(facts["weights_sha256"]) == 64
    flags = [
        word
        for name in ("seed", "num_inference_steps", "guidance_scale", "height", "width", "dtype")
        for word in (f"--{name}", facts[name])
    ]
    assert facts["model"] == orphan.name  # no path of the machine
    flags += ["--model", orphan]
    process = start_script(GENERATE, "--prompt", facts["prompt"], *flags, "--output_dir", tmp_path / "again")
    assert process.returncode == 0, process.stderr
    again = Image.open(next((tmp_path / "again").glob("0*.png")))
    # Sums of a batch of four may round otherwise than those of one image.
    assert np.abs(np.array(original, dtype=int) - np.array(again, dtype=int)).max() <= 1


def test_without_a_prompt_the_validation_prompts_of_the_run_are_used(orphan, tmp_path):
    process = start_script(GENERATE, "--model", orphan, "--output_dir", tmp_path)
    assert process.returncode == 0, process.stderr
    prompts = json.loads((orphan / "run.json").read_text())["validation_prompts"]
    prompts_of_images = [Image.open(path).text["prompt"] for path in sorted(tmp_path.glob("0*.png"))]
    assert prompts_of_images == prompts and (tmp_path / f"grid-0000-{len(prompts) - 1:04d}.png").is_file()


def test_official_and_diffusers_layouts_train_bitwise_the_same_student(
    official_teacher_with_components, orphan, tmp_path
):
    process = start_script(
        TRAIN, "--teacher", official_teacher_with_components, "--output_dir", tmp_path / "run", *SHORT_RUN
    )
    assert process.returncode == 0, process.stderr
    assert are_equal(weights(tmp_path / "run"), weights(orphan))


@pytest.fixture(scope="module")
def official_teacher_with_components(tmp_path_factory):
    """The experts in the official layout beside the components that both layouts share."""
    folder = tmp_path_factory.mktemp("official_with_components") / "teacher"
    write_official(TINY_TEACHER, folder)
    for part in ("vae", "text_encoder", "tokenizer", "scheduler"):
        shutil.copytree(TINY_TEACHER / part, folder / part)
    for name in ("training.json", "model_index.json"):
        shutil.copy(TINY_TEACHER / name, folder)
    return folder


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_an_interrupted_and_resumed_run_ends_with_the_same_weights(how, orphan, tmp_path):
    command = [sys.executable, str(TRAIN), "--output_dir", str(tmp_path / "run"), *SHORT_RUN]
    one_thread = os.environ | {
        "OMP_NUM_THREADS": "1"
    }  # as in start_script: sums depend on the number of threads
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=one_thread
    )
    deadline = time.time() + 200
    while not (tmp_path / "run/checkpoints/step-000003").exists():
        assert time.time() < deadline and process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    process.send_signal(how)
    printed, _ = process.communicate()
    if how == signal.SIGTERM and process.returncode != 0:
        assert process.returncode == 3 and "stopped at step" in printed
    if process.returncode != 0:
        assert not json.loads((tmp_path / "run/run.json").read_text())["finished"]
        resumed = subprocess.run(command, capture_output=True, text=True, env=one_thread)
        assert resumed.returncode == 0 and "resumed at step" in resumed.stdout, resumed.stderr
    assert are_equal(weights(tmp_path / "run"), weights(orphan))
