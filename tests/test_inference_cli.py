"""run_inference.py on the command line: unusable input is one line and exit code 2, before torch is
imported.
"""

import json
import shutil
import signal
import subprocess
import sys

import pytest

from run_inference import read_settings
from tests.conftest import ROOT, run_script
from tests.test_command_lines import read_refusal
from wanlite.flow import make_scheduler

GENERATE = ROOT / "run_inference.py"


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--seed", "-1"], "must lie in 0"),
        (["--seed", str(2**63)], "must lie in 0"),
        (["--seed", str(2**63 - 1), "--num_images_per_prompt", "2"], "must lie in 0"),
        (["--num_inference_steps", "1001"], "at most 1000"),
        (["--guidance_scale", "0.5"], "expected 1 (none) or more"),
        (["--height", "32768"], "at most"),
        (["--height", "-64"], "divisible by 16; the nearest is 16"),
    ],
)
def test_numbers_out_of_range_are_refused(arguments, words, finished_run, tmp_path):
    assert words in read_refusal(
        GENERATE, "--model", finished_run[0], "--output_dir", tmp_path / "images", *arguments
    )
    assert not (tmp_path / "images").exists()


def test_an_output_folder_that_is_a_file_is_refused(finished_run, tmp_path):
    (tmp_path / "file").write_text("mine")
    for place in ("file", "file/below"):
        assert "is a file" in read_refusal(
            GENERATE, "--model", finished_run[0], "--output_dir", tmp_path / place
        )
    assert (tmp_path / "file").read_text() == "mine"


@pytest.fixture
def copied_run(finished_run, tmp_path):
    shutil.copytree(finished_run[0], tmp_path / "run", ignore=shutil.ignore_patterns("cache", "checkpoints"))
    return tmp_path / "run"


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"resolution": "64"}, "not divisible by 16"),
        ({"resolution": 60}, "the nearest is 64"),
        ({"resolution": True}, "not divisible by 16"),
        ({"num_inference_steps": "4"}, "expected a whole number"),
        ({"num_inference_steps": 0}, "at least 1"),
        ({"validation_prompts": "abc"}, "no prompt: "),
    ],
)
def test_a_damaged_run_json_is_refused(changes, words, copied_run):
    run = json.loads((copied_run / "run.json").read_text())
    del run["drawing_sha256"]
    (copied_run / "run.json").write_text(json.dumps(run | changes))
    assert words in read_refusal(GENERATE, "--model", copied_run)


def test_a_validation_prompt_that_utf8_cannot_encode_is_refused(copied_run):
    path = copied_run / "run.json"
    run = json.loads(path.read_text()) | {"validation_prompts": ["a ring", "\ud800 cat"]}
    del run["drawing_sha256"]
    path.write_text(json.dumps(run))
    assert r"run.json: a validation prompt holds '\ud800', not a character" in read_refusal(
        GENERATE, "--model", copied_run
    )


def test_a_prompt_over_the_token_limit_is_used_with_one_line_that_names_it(finished_run, tmp_path):
    prompts = ("", "a red ring " * 300, "a ring")
    (tmp_path / "prompts.jsonl").write_text("".join(f'{{"prompt": "{prompt}"}}\n' for prompt in prompts))
    process = run_script(
        GENERATE,
        "--model",
        finished_run[0],
        "--output_dir",
        tmp_path / "generated",
        "--prompts_file",
        tmp_path / "prompts.jsonl",
        "--negative_prompt",
        "blur " * 600,
        "--guidance_scale",
        "2",
    )
    (printed,) = (line for line in process.stdout.splitlines() if line.startswith("WARNING"))
    assert printed.startswith(
        "WARNING: prompts truncated to the limit of 512 tokens: 2, first 'a red ring a red"
    )
    assert "1 of 3 rows hold no prompt and are left out: 1\n" in process.stdout and process.returncode == 0


@pytest.mark.parametrize(
    "name",
    ["vae/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors", "tokenizer/tokenizer.json"],
)
def test_a_truncated_or_missing_component_is_named(name, copied_run):
    path = copied_run / name
    path.write_bytes(path.read_bytes()[:1000])
    assert f"{path.name} differs from its manifest" in read_refusal(GENERATE, "--model", copied_run)
    path.unlink()
    assert f"lacks {path.name}" in read_refusal(GENERATE, "--model", copied_run)


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("vae/config.json", "[1]", "lacks the patch size, the stride or the largest size"),
        ("config.json", None, "patch_size is 2, was [1, 2, 2]"),
        ("vae/config.json", "{", "lacks the patch size, the stride or the largest size"),
    ],
)
def test_configs_without_sizes_are_refused(name, content, words, copied_run):
    (copied_run / "vae/manifest.json").unlink()  # as in a folder assembled by hand
    if content is None:
        content = json.dumps(json.loads((copied_run / name).read_text()) | {"patch_size": 2})
    (copied_run / name).write_text(content)
    assert words in read_refusal(GENERATE, "--model", copied_run)


def test_an_untrained_number_of_steps_is_refused_with_the_trained_ones(finished_run, tmp_path):
    printed = read_refusal(
        GENERATE,
        "--model",
        finished_run[0],
        "--output_dir",
        tmp_path / "images",
        "--num_inference_steps",
        "3",
    )
    assert "was trained for 1, 2, 4 steps" in printed and not (tmp_path / "images").exists()


def test_an_older_or_unrefined_student_takes_any_number_of_steps(copied_run):
    run = json.loads((copied_run / "run.json").read_text())
    del run["drawing_sha256"]
    for schedule, few_steps in ((None, (1, 2, 4)), (None, ()), ({"flow_shift": 3.0, "few_steps": None}, ())):
        make_scheduler(3.0, few_steps).save_pretrained(copied_run / "scheduler")
        (copied_run / "run.json").write_text(json.dumps(run | {"schedule": schedule}))
        settings, _ = read_settings(["--model", str(copied_run), "--num_inference_steps", "3"])
        assert settings.num_inference_steps == 3


@pytest.mark.parametrize(
    "changes, words",
    [
        (
            {"prediction_type": "epsilon"},
            "prediction_type is 'epsilon', expected 'flow_prediction', as the student was trained",
        ),
        ({"_class_name": "DDIMScheduler"}, "_class_name is 'DDIMScheduler'"),
        ({"flow_shift": 5.0}, "flow_shift is 5.0, expected 3.0"),
        ({"use_flow_sigmas": None}, "use_flow_sigmas is None"),
        ({"num_train_timesteps": "x"}, "num_train_timesteps is 'x'"),
        ({"final_sigmas_type": "sigma_min"}, "final_sigmas_type is 'sigma_min', expected 'zero'"),
        ({"thresholding": True}, "thresholding is True, expected False"),
        ({"beta_schedule": "evil"}, "beta_schedule is 'evil', expected 'linear'"),
        (None, "100,000 lists and objects"),
    ],
)
def test_a_schedule_other_than_that_of_the_training_is_refused(changes, words, copied_run):
    place = copied_run / "scheduler/scheduler_config.json"
    place.write_text("[" * 10**5 if changes is None else json.dumps(json.loads(place.read_text()) | changes))
    assert words in read_refusal(GENERATE, "--model", copied_run)


@pytest.mark.parametrize("few_steps", [4, ["4"], {"4": 4}])
def test_invalid_numbers_of_steps_are_refused(few_steps, copied_run):
    run = json.loads((copied_run / "run.json").read_text())
    del run["drawing_sha256"]
    (copied_run / "run.json").write_text(
        json.dumps(run | {"schedule": run["schedule"] | {"few_steps": few_steps}})
    )
    assert f"few_steps is {few_steps!r}, expected whole numbers" in read_refusal(
        GENERATE, "--model", copied_run
    )


def test_ctrl_c_ends_inference_without_a_traceback(finished_run, tmp_path):
    command = [
        sys.executable,
        GENERATE,
        "--model",
        finished_run[0],
        "--output_dir",
        tmp_path,
        "--num_images_per_prompt",
        "2000",
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline().startswith("generating")
    process.send_signal(signal.SIGINT)
    _, printed = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGINT and "Traceback" not in printed


def test_running_out_of_memory_is_one_line_with_advice(finished_run, tmp_path):
    code = f"""import runpy, sys, torch, wanlite.flow
def run_out(*arguments):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\\nOf the allocated memory ...")
wanlite.flow.set_steps = run_out
sys.argv = ["run_inference.py", "--model", "{finished_run[0]}", "--output_dir", "{tmp_path}"]
runpy.run_path("{GENERATE}", run_name="__main__")"""
    process = run_script("-c", code)
    assert process.returncode == 2 and "Traceback" not in process.stderr
    assert process.stderr.splitlines()[-1].startswith(
        "run_inference.py: CUDA out of memory. Tried to allocate 2.00 GiB. Lower"
    )
