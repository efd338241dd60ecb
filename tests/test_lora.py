"""wanlite-lora: files for diffusers and ComfyUI, the same images in both pipelines, refusals of one line."""

import json
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import WanPipeline
from PIL import Image
from safetensors.torch import load_file

from tests.conftest import ROOT, loud_student, official_name
from tests.test_adapters_and_quantisation import PROMPT, generate, needs_peft
from train_distillation import WanLiteStudent
from wanlite.flow import make_scheduler, seeded_noise
from wanlite.lora import __main__ as command
from wanlite.lora.training import (
    COMFYUI_FILE,
    DIFFUSERS_FILE,
    add_lora,
    batches,
    draw_levels,
    draw_own,
    velocity_without_lora,
)
from wanlite.network import pack_text
from wanlite.pipeline import WanLitePipeline
from wanlite.training.run_folder import save_components
from wanlite.world import shapes

SHAPE = {"hidden_size": 64, "depth": 2, "num_heads": 4, "text_dim": 64, "rope_max_seq_len": 64}
STEPS = 3


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A saved student with the components of the tiny teacher."""
    folder = tmp_path_factory.mktemp("adapted") / "student"
    loud_student(**SHAPE).save_pretrained(folder)
    save_components(folder, ROOT / "tiny_teacher", make_scheduler(3.0))
    (folder / "run.json").write_text(json.dumps({"resolution": 64, "num_inference_steps": 2}))
    return folder


def write_images(folder, count=3, captions=True):
    folder.mkdir()
    random = np.random.default_rng(0)
    for number in range(count):
        Image.fromarray(random.integers(0, 256, (64, 64, 3), np.uint8)).save(folder / f"{number}.png")
        if captions:
            (folder / f"{number}.txt").write_text("a small red circle at the left on a white background")
    return folder


@pytest.fixture(scope="module")
def trained(saved, tmp_path_factory):
    """A LoRA of a few steps at a large learning rate."""
    folder = tmp_path_factory.mktemp("lora")
    images = write_images(folder / "images")
    flags = ["--max_train_steps", STEPS, "--learning_rate", "0.1", "--train_batch_size", "2", "--rank", "4"]
    flags += ["--num_prompts", "3"]
    arguments = ["--model", saved, "--images", images, "--output_dir", folder / "lora", *flags]
    command.main(list(map(str, arguments)))
    return folder / "lora"


def load(kind, folder, *loras):
    pipeline = kind.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    for number, lora in enumerate(loras):
        pipeline.load_lora_weights(str(lora), adapter_name=f"lora{number}")
    return pipeline


def draw(pipeline):
    noise = seeded_noise((16, 8, 8), [5])
    return pipeline("a red ring", latents=noise, num_inference_steps=2, output_type="np").images


@needs_peft
def test_both_files_hold_the_same_matrices_of_every_layer(trained):
    ours, theirs = load_file(trained / DIFFUSERS_FILE), load_file(trained / COMFYUI_FILE)
    assert len(ours) == len(theirs) == SHAPE["depth"] * 10 * 2
    for name, matrix in ours.items():
        layer, _, side = name.removeprefix("transformer.").rpartition(".lora_")
        official = official_name(f"{layer}.weight").removesuffix(".weight")
        assert torch.equal(theirs[f"diffusion_model.{official}.lora_{side}"], matrix)
    assert all(matrix.any() for name, matrix in ours.items() if ".lora_B" in name)


@needs_peft
def test_a_lora_draws_the_same_image_in_both_pipelines_and_from_both_files(saved, trained):
    plain = generate(load(WanPipeline, saved))
    stock = generate(load(WanPipeline, saved, trained / DIFFUSERS_FILE))
    converted = generate(load(WanPipeline, saved, trained / COMFYUI_FILE))
    assert not np.allclose(stock, plain, atol=0.01) and np.array_equal(stock, converted)
    ours = load(WanLitePipeline, saved, trained)
    noise = seeded_noise((16, 8, 8), [5])  # that of generate()
    images = ours(PROMPT, latents=noise, num_inference_steps=2, output_type="np").images
    assert np.allclose(images, stock[:, 0], atol=1e-5)


@needs_peft
def test_a_lora_is_fused_unloaded_and_combined(saved, trained):
    pipeline = load(WanLitePipeline, saved)
    plain = draw(pipeline)
    pipeline = load(WanLitePipeline, saved, trained, trained)
    pipeline.set_adapters(["lora0", "lora1"], [0.5, 0.5])  # the sum is the LoRA itself
    combined = draw(pipeline)
    pipeline.delete_adapters("lora1")
    pipeline.set_adapters("lora0", 1.0)
    adapted = draw(pipeline)
    assert np.allclose(combined, adapted, atol=1e-4) and not np.allclose(adapted, plain, atol=0.01)
    pipeline.fuse_lora()
    assert np.allclose(draw(pipeline), adapted, atol=1e-4)
    pipeline.unfuse_lora()
    pipeline.unload_lora_weights()
    assert np.allclose(draw(pipeline), plain, atol=1e-4)


@needs_peft
def test_a_lora_of_another_width_is_refused_and_leaves_the_pipeline_as_it_was(saved, trained, tmp_path):
    shutil.copytree(saved, tmp_path / "wider")
    loud_student(**SHAPE | {"hidden_size": 96}).save_pretrained(tmp_path / "wider")
    pipeline = load(WanLitePipeline, tmp_path / "wider")
    plain = draw(pipeline)
    with pytest.raises(ValueError, match=r"^[^\n]*is for a width of 64, the student has 96[^\n]*$"):
        pipeline.load_lora_weights(str(trained))
    assert np.array_equal(draw(pipeline), plain)


def test_batches_hold_both_kinds_of_images_of_one_size_and_follow_the_seed():
    groups, own = (
        [
            (torch.full((count, 1, size, size), float(kind)), [torch.zeros(1, 1)] * count)
            for size, count in sizes
        ]
        for kind, sizes in enumerate((((8, 6), (4, 2)), ((8, 9), (4, 9))))
    )

    def summary(seed):
        rows = zip(batches(groups, own, 4, seed), range(40))
        return [
            (num_new, tuple(latents.shape), latents.mean((1, 2, 3)).sum().item())
            for (num_new, latents, _), _ in rows
        ]

    assert set(summary(0)) == {(4, (12, 1, 8, 8), 8.0), (2, (10, 1, 4, 4), 8.0)}
    assert summary(0) == summary(0) != summary(1)


def test_noise_levels_are_those_of_the_few_steps_or_cover_all():
    generator = torch.Generator().manual_seed(0)
    states = [(999.0, 1.0), (750.0, 0.75)]
    timestep, level = draw_levels(states, 3.0, 50, generator)
    assert set(zip(timestep.tolist(), level.tolist())) == set(states)
    timestep, level = draw_levels([], 3.0, 1000, generator)
    assert torch.equal(timestep, 1000 * level) and level.min() < 0.1 and level.max() > 0.95
    assert level.median() == pytest.approx(0.75, abs=0.05)  # 0.5, shifted by 3


@needs_peft
def test_own_images_are_those_of_the_pipeline_and_keep_the_velocity(saved):
    student = WanLiteStudent.from_pretrained(saved)
    pipeline = load(WanLitePipeline, saved)
    groups = [(torch.zeros(1, 16, 8, 8), [torch.zeros(1, 64)])]
    ((latents, texts),) = draw_own(student, saved, groups, ["a red ring"], make_scheduler(3.0), 2)
    noise = seeded_noise((16, 8, 8), [0])
    drawn = pipeline("a red ring", latents=noise, num_inference_steps=2, output_type="latent").images
    assert torch.allclose(latents, drawn, atol=1e-5)
    text, timestep = pack_text(texts), torch.tensor([500.0])
    with torch.no_grad():
        before = student(latents, timestep, text).sample
    for parameter in add_lora(student, 4):
        torch.nn.init.ones_(parameter)
    assert not torch.allclose(student(latents, timestep, text).sample, before, atol=0.01)
    assert torch.equal(velocity_without_lora(student, latents, timestep, text), before)


def test_other_prompts_are_those_of_the_file_or_of_the_training(tmp_path):
    settings = command.Settings(num_prompts=3)
    (tmp_path / "prompts.txt").write_text("a cat\na dog\n")
    recorded = {"settings": {"prompts": str(tmp_path / "prompts.txt")}}
    assert command.other_prompts(settings, recorded) == ["a cat", "a dog"]
    world = {"settings": {"prompts": None, "teacher": str(ROOT / "tiny_teacher")}}
    assert command.other_prompts(settings, world) == shapes.captions(0, 3)
    assert len(command.other_prompts(settings, {})) == 3
    typed = replace(settings, prompts=str(tmp_path / "prompts.txt"))
    assert command.other_prompts(typed, world) == ["a cat", "a dog"]


@needs_peft
@pytest.mark.parametrize(
    "change, message",
    [
        (lambda folder: {"images": str(folder / "missing")}, "no such file or folder"),
        (lambda folder: {"images": str(write_images(folder / "bare", captions=False))}, "caption"),
        (lambda folder: {"images": None}, "--images is missing"),
        (lambda folder: {"model": str(folder / "missing")}, "no such folder"),
        (lambda folder: {"prompts": str(folder / "missing")}, "no such file"),
        (lambda folder: {"rank": "0"}, "--rank is 0, expected at least 1"),
        (lambda folder: {"learning_rate": "nan"}, "--learning_rate is nan"),
        (lambda folder: {"output_dir": str(folder)}, "exists. Name another"),
    ],
)
def test_wrong_input_is_refused(change, message, saved, tmp_path, capsys):
    images = write_images(tmp_path / "images")
    values = {"model": str(saved), "images": str(images), "output_dir": str(tmp_path / "lora")}
    values |= change(tmp_path)
    refuse(capsys, values, message)
    assert not (tmp_path / "lora").exists()


def test_a_missing_peft_is_refused_with_the_extra_to_install(saved, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(command, "find_spec", lambda name: None)
    values = {"model": str(saved), "images": str(tmp_path), "output_dir": str(tmp_path / "lora")}
    refuse(capsys, values, r"package peft. Install it with: pip install wanlite\[lora\]")


def refuse(capsys, values, message):
    """Check that a command is refused in one line with exit code 2."""
    with pytest.raises(SystemExit) as refusal:
        command.main([text for name, value in values.items() if value for text in (f"--{name}", value)])
    error = capsys.readouterr().err
    lines = [line for line in error.splitlines() if line.startswith("wanlite-lora: ")]
    assert refusal.value.code == 2 and len(lines) == 1 and re.search(message, lines[0]), error
