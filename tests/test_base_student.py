"""base/, the student before the few-step phase: its files, its images, and LoRAs that are trained on it."""

import os
import shutil
import signal

import pytest
import torch
from diffusers import WanPipeline
from safetensors.torch import load_file

from run_inference import read_settings
from tests.conftest import ROOT, run_script
from tests.test_adapters_and_quantisation import LAYERS, PROMPT, RANK, needs_peft, velocity
from tests.test_resuming import train
from train_distillation import Settings, WanLiteStudent
from wanlite.planning.resolve import complete
from wanlite.training.run_folder import clear, link_file, read_run

WEIGHTS = "diffusion_pytorch_model.safetensors"


def test_base_is_the_student_at_the_end_of_the_velocity_phase(finished_run, tmp_path):
    """A run of the same steps whose later phases differ has the same base."""
    shutil.copytree(finished_run[0] / "cache", tmp_path / "run/cache")
    code, printed = train(tmp_path / "run", "--diversity_gain", "0")
    assert code == 0, printed
    first, second = (load_file(run / "base" / WEIGHTS) for run in (finished_run[0], tmp_path / "run"))
    few_step = load_file(finished_run[0] / WEIGHTS)
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    assert any(not torch.equal(tensor, few_step[name]) for name, tensor in first.items())


def test_a_run_resumed_after_the_velocity_phase_keeps_its_base(finished_run, tmp_path):
    shutil.copytree(finished_run[0] / "cache", tmp_path / "run/cache")
    code, _ = train(tmp_path / "run", at={4: lambda: os.kill(os.getpid(), signal.SIGTERM)})
    assert code == 3 and sorted(path.name for path in (tmp_path / "run/base").iterdir()) == [
        "config.json",
        WEIGHTS,
    ]
    code, printed = train(tmp_path / "run")
    assert code == 0 and "resumed at step 4" in printed
    first, second = (load_file(run / "base" / WEIGHTS) for run in (finished_run[0], tmp_path / "run"))
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def test_base_draws_in_as_many_steps_as_the_teacher(finished_run, tmp_path):
    base = finished_run[0] / "base"
    settings, _ = read_settings(["--model", str(base)])
    assert settings.num_inference_steps == read_run(finished_run[0])["settings"]["teacher_steps"] == 8
    assert read_run(base)["schedule"] == {
        "flow_shift": 3.0,
        "few_steps": None,
        "phases": {"velocity": 2, "few_step": 0, "matching": 0},
    }
    process = run_script(
        ROOT / "run_inference.py", "--model", base, "--output_dir", tmp_path, "--prompt", PROMPT
    )
    assert process.returncode == 0 and len(list(tmp_path.glob("*.png"))) == 1, process.stderr


def test_stock_diffusers_loads_base_with_its_own_schedule(finished_run):
    pipeline = WanPipeline.from_pretrained(finished_run[0] / "base")
    assert pipeline.scheduler.config.solver_order == 2 and not pipeline.scheduler.config.disable_corrector
    student = WanLiteStudent.from_pretrained(finished_run[0] / "base")
    assert torch.equal(velocity(pipeline.transformer), velocity(student))


def test_the_components_of_base_take_no_space(finished_run):
    run = finished_run[0]
    for name in ("vae/" + WEIGHTS, "text_encoder/model.safetensors", "tokenizer/tokenizer.json"):
        assert (run / name).samefile(run / "base" / name)


def test_a_disk_without_links_gets_copies(tmp_path, monkeypatch):
    def refuse(source, target):
        raise PermissionError("no links here")

    monkeypatch.setattr(os, "link", refuse)
    (tmp_path / "source").write_text("text")
    link_file(tmp_path / "source", tmp_path / "target")
    assert (tmp_path / "target").read_text() == "text"


def test_base_can_be_trained_further_and_is_removed_with_its_run(finished_run, tmp_path):
    shutil.copytree(finished_run[0], tmp_path / "run", ignore=shutil.ignore_patterns("cache"))
    further = Settings(
        student=str(tmp_path / "run/base"), teacher_steps=8, max_train_steps=4, few_step_train_steps=4
    )
    assert complete(further).student == str(tmp_path / "run/base")
    clear(tmp_path / "run")
    assert not (tmp_path / "run/base").exists()


@needs_peft
def test_a_lora_of_base_changes_the_few_step_student(finished_run, tmp_path):
    from peft import LoraConfig

    run = finished_run[0]
    base = WanLiteStudent.from_pretrained(run / "base")
    base.add_adapter(LoraConfig(r=RANK, target_modules=LAYERS, init_lora_weights=False))
    base.save_lora_adapter(tmp_path)
    student = WanLiteStudent.from_pretrained(run)
    before = velocity(student)
    student.load_lora_adapter(load_file(tmp_path / "pytorch_lora_weights.safetensors"), prefix=None)
    changed = {name for name, _ in student.named_parameters() if "lora" in name}
    assert len(changed) == 2 * len(LAYERS) * len(student.blocks)
    assert not torch.equal(velocity(student), before)


@pytest.mark.parametrize("steps, has_base", [(6, False), (0, False)])
def test_a_run_without_both_phases_has_no_base(steps, has_base, finished_run, tmp_path):
    flags = ("--few_step_train_steps", steps, "--matching_steps", 0, "--overwrite")
    if steps:
        flags += ("--student", finished_run[0] / "base")
    else:
        shutil.copytree(finished_run[0] / "cache", tmp_path / "run/cache")
    code, printed = train(tmp_path / "run", *flags)
    assert code == 0 and (tmp_path / "run/base").exists() == has_base, printed
