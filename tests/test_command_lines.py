"""Both scripts on the command line: every wrong argument is one line and exit code 2, before torch is
imported.
"""

import dataclasses
import json
import os
import pwd
import re
import shlex
import shutil
import sys
import time
from importlib import import_module

import numpy as np
import pytest
import torch
from diffusers import WanPipeline, WanTransformer3DModel
from PIL import Image
from safetensors.torch import load_file

from tests.conftest import ROOT, SHORT_RUN, TINY_TEACHER, run_script, start_script
from train_distillation import Settings as TrainSettings
from train_distillation import WanLiteStudent
from wanlite.data.grids import CELL, enlarge, locate
from wanlite.files.atomic import write_json
from wanlite.generation.settings import Settings as InferenceSettings
from wanlite.planning.settings import make_parser
from wanlite.training.run_folder import read_run

TRAIN, GENERATE = ROOT / "train_distillation.py", ROOT / "run_inference.py"


def read_refusal(script, *arguments, seconds=2.0):
    """Run a script that must reject its arguments; return the one line that it prints.

    (The goal is one second; the bound is twice that for a busy machine. Importing torch alone takes longer.)
    """
    began = time.perf_counter()
    process = start_script(script, *arguments)
    assert time.perf_counter() - began < seconds
    assert process.returncode == 2 and process.stdout == ""
    lines = [line for line in process.stderr.splitlines() if line.strip()]
    assert len(lines) == 1, process.stderr
    return lines[0]


PATHS = {
    TrainSettings: ("teacher", "prompts", "images", "output_dir", "cache_dir", "student", "logging_dir"),
    InferenceSettings: ("model", "prompts_file", "output_dir"),
}


@pytest.mark.parametrize(
    "settings, name", [(settings, name) for settings, names in PATHS.items() for name in names]
)
def test_a_tilde_is_expanded_in_every_path_and_an_unknown_user_is_named(settings, name, monkeypatch, capsys):
    monkeypatch.setenv("HOME", "/home/somebody")
    parser = make_parser(settings, "")
    for typed, path in (
        ("~/a b", "/home/somebody/a b"),
        ("~", "/home/somebody"),
        ("~root/x", f"{pwd.getpwnam('root').pw_dir}/x"),
        ("./~/x", "./~/x"),
        ("x~", "x~"),
        ("", ""),
    ):
        assert getattr(parser.parse_args([f"--{name}={typed}"]), name) == path
        assert getattr(parser.parse_args([f"--{name}", typed]), name) == path
    with pytest.raises(SystemExit) as ended:
        parser.parse_args([f"--{name}=~nobody-here/x"])
    assert (
        ended.value.code == 2
        and "~nobody-here/x: no user nobody-here exists. Write" in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    "settings, flag",
    [
        (TrainSettings, "--negative_prompt"),
        (TrainSettings, "--validation_prompts"),
        (TrainSettings, "--report_to"),
        (TrainSettings, "--output_dir"),
        (TrainSettings, "--images"),
        (InferenceSettings, "--prompt"),
        (InferenceSettings, "--negative_prompt"),
        (InferenceSettings, "--device"),
        (InferenceSettings, "--output_dir"),
    ],
)
def test_invalid_utf8_is_refused_in_every_flag(settings, flag, capsys):
    parser = make_parser(settings, "", repeatable=("prompt",))
    with pytest.raises(SystemExit) as ended:
        parser.parse_args([flag, os.fsdecode(b"a \xff cat")])
    assert (
        ended.value.code == 2
        and rf"argument {flag}: 'a \udcff cat' is not UTF-8 text (character 3)" in capsys.readouterr().err
    )


def test_a_prompt_is_read_as_utf8_in_an_ascii_locale():
    parser = make_parser(InferenceSettings, "", repeatable=("prompt",))
    arguments = parser.parse_args(
        ["--prompt", "caf\udcc3\udca9"]
    )  # as Python decodes its bytes in that locale
    assert arguments.prompt == ["caf\N{LATIN SMALL LETTER E WITH ACUTE}"]


@pytest.mark.parametrize(
    "settings, typed, suggested",
    [
        (TrainSettings, "--segment_steps", "--few_step_train_steps"),
        (TrainSettings, "--own_path_pictures", "--rollout_states"),
        (TrainSettings, "--validation_walks", "--validation_trajectories"),
        (TrainSettings, "--variety_gain=0.3", "--diversity_gain"),
        (TrainSettings, "--critic_pull", "--critic_lerp"),
        (TrainSettings, "--lr", "--learning_rate"),
        (TrainSettings, "--batch_size", "--train_batch_size"),
        (TrainSettings, "--dry", "--dry_run"),
        (TrainSettings, "--max", "--max_train_steps or --max_grad_norm"),
        (
            TrainSettings,
            "--learning-rate",
            "--learning_rate or --muon_learning_rate or --critic_learning_rate",
        ),
        (InferenceSettings, "--promt", "--prompt or --port or --prompts_file"),
        (InferenceSettings, "-seed", "--seed or --serve"),
    ],
)
def test_a_wrong_flag_is_refused_and_similar_flags_are_suggested(settings, typed, suggested, capsys):
    with pytest.raises(SystemExit) as ended:
        make_parser(settings, "").parse_args([typed, "3"])
    error = capsys.readouterr().err
    assert ended.value.code == 2 and error.count("\n") == 1
    assert f"unrecognized arguments: {typed} (did you mean {suggested}?) 3 (--help" in error


@pytest.mark.parametrize(
    "settings, typed, advice",
    [
        (TrainSettings, ["--prompts", "my", "prompts.txt"], ""),
        (TrainSettings, ["--negative_prompt", "a", "blue", "ring"], ""),
        (InferenceSettings, ["--prompt", "a", "b"], ", and --prompt can be repeated"),
    ],
)
def test_a_value_without_quotes_gets_advice(settings, typed, advice, capsys):
    with pytest.raises(SystemExit):
        make_parser(settings, "", repeatable=("prompt",)).parse_args(typed)
    rest = " ".join(typed[2:])
    words = f"unrecognized arguments: {rest}; a value with spaces needs quotes{advice} (--help"
    assert words in capsys.readouterr().err


def test_a_flag_unlike_all_others_gets_no_suggestion(capsys):
    with pytest.raises(SystemExit):
        make_parser(TrainSettings, "").parse_args(["--xyzzy"])
    assert "unrecognized arguments: --xyzzy (--help_all lists every flag)" in capsys.readouterr().err


@pytest.mark.parametrize("settings", [TrainSettings, InferenceSettings])
def test_help_has_every_flag_under_a_heading(settings):
    options, *groups = make_parser(settings, "").format_help().partition("options:\n")[2].split("\n\n")
    assert re.findall("^  (-.*?)  ", options, re.MULTILINE) == ["-h, --help", "--help_all"]
    assert all(re.match(r"[a-z ]+:\n  --", group) for group in groups)
    listed = re.findall(r"^  --(\w+)", "\n".join(groups), re.MULTILINE)
    assert listed == [field.name for field in dataclasses.fields(settings)]


@pytest.mark.parametrize("settings", [TrainSettings, InferenceSettings])
def test_help_has_every_default_except_switches_that_are_off(settings):
    *_, listed = make_parser(settings, "").format_help().partition("--help_all")
    _, *entries = re.split(r"\n  (?=--)", listed)
    entries = [" ".join(entry.split()) for entry in entries]
    for field, entry in zip(dataclasses.fields(settings), entries, strict=True):
        assert (entry.count("(default: ") == 1) == (field.default is not False), entry
    assert any(re.match(r"--seed N .*\(default: 0\)", entry) for entry in entries)


@pytest.mark.parametrize("settings", [TrainSettings, InferenceSettings])
def test_the_brief_help_fits_a_terminal_and_names_its_defaults(settings, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    module = sys.modules[settings.__module__]
    with pytest.raises(SystemExit) as ended:
        make_parser(settings, module.__doc__).parse_args(["--help"])
    lines = capsys.readouterr().out.splitlines()
    assert ended.value.code == 0 and len(lines) <= 40 and "--help_all" in "".join(lines)
    _, _, *entries = re.split(r"\n(?=--)", "\n".join(lines))
    switches = [f"--{field.name}" for field in dataclasses.fields(settings) if field.default is False]
    for entry in entries:
        assert "(default:" in entry or entry.split()[0].rstrip(",") in switches, entry


def test_a_wrong_value_is_refused_without_a_hint_about_flags(tmp_path):
    assert "--help" not in read_refusal(TRAIN, "--output_dir", tmp_path, "--resolution", "60")


@pytest.mark.parametrize("name", ["gpu", "cuda:", "cuda:-1", "CUDA", "cuda:1234", "", "cpu\x1b[2J", "meta"])
@pytest.mark.parametrize("module", ["wanlite.generation.checks", "wanlite.lora.__main__", "wanlite.small"])
def test_every_command_refuses_a_device_that_no_machine_has(module, name, finished_run):
    command = import_module(module)
    settings = command.Settings(model=str(finished_run[0]), device=name)
    with pytest.raises(
        ValueError, match="--device .* is unknown, expected cpu, cuda, cuda:N or mps"
    ) as error:
        command.complete(settings)
    assert str(error.value).isprintable()


@pytest.mark.parametrize("script", [TRAIN, GENERATE])
def test_help_takes_half_a_second_at_most(script):
    before = os.times()
    assert start_script(script, "--help").returncode == 0
    after = os.times()
    seconds = after.children_user + after.children_system - before.children_user - before.children_system
    assert seconds <= 0.5  # CPU time, which other load on the machine does not change


@pytest.mark.slow
def test_a_tilde_is_expanded_alike_in_all_output_and_files(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    process = run_script(TRAIN, "--output_dir=~/run", "--cache_dir=~/cache", *SHORT_RUN, cwd=tmp_path)
    assert process.returncode == 0 and "~" not in process.stdout, process.stderr
    assert process.stdout.splitlines()[-1].endswith(f"--model {tmp_path}/run")
    assert sorted(path.name for path in tmp_path.iterdir() if path.name[0] != ".") == ["cache", "run"]


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--teacher", "/no/such/wan"], "no such folder"),
        (["--teacher", str(ROOT / "tests")], "no Wan transformer. Expected transformer/"),
        (["--prompts", "/no/such/prompts.txt"], "no such file"),
        (["--prompts", str(ROOT)], "not a file"),
        (["--resolution", "60"], "divisible by 16; the nearest is 64"),
        (["--max_train_steps", "0"], "at least 1"),
        (["--max_train_steps", "many"], "invalid int value"),
        (["--checkpoints_total_limit", "1"], "at least 2"),
        (["--projection", "magic"], "invalid choice"),
        (["--no_such_flag"], "unrecognized arguments"),
    ],
)
def test_training_rejects_wrong_arguments_in_one_line(arguments, words, tmp_path):
    assert words in read_refusal(TRAIN, "--output_dir", tmp_path / "run", *arguments)
    assert not (tmp_path / "run").exists()


def test_best_per_block_experts_need_plain_projection(tmp_path):
    assert "--expert best_per_block requires --projection weights" in read_refusal(
        TRAIN, "--output_dir", tmp_path / "run", "--expert", "best_per_block"
    )


def test_runs_with_the_same_teacher_shape_and_method_share_one_projection(tmp_path):
    def initializations():
        return {
            path.name: path.stat().st_mtime_ns
            for path in (tmp_path / "run/cache").glob("start-*/*.safetensors")
        }

    arguments = ("--output_dir", tmp_path / "run", *SHORT_RUN)
    process = run_script(TRAIN, *arguments, "--project_only")
    assert process.returncode == 0, process.stderr
    (folder,) = (tmp_path / "run/cache").glob("start-*")
    first = WanLiteStudent.from_pretrained(folder).state_dict()
    before = initializations()
    trained = run_script(TRAIN, *arguments)
    assert trained.returncode == 0 and "energy kept" not in trained.stdout, trained.stderr
    report = json.loads((tmp_path / "run/run.json").read_text())["projection"]
    assert (
        initializations() == before and report["experts"] == ["high"] * 4 and report["calibration_frames"] > 0
    )
    assert "holds a finished run" in read_refusal(
        TRAIN, *arguments, "--project_only", "--projection", "weights"
    )
    assert json.loads((tmp_path / "run/run.json").read_text())["finished"]  # the finished run is unchanged
    again = WanLiteStudent.from_pretrained(folder).state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in first.items())


@pytest.fixture(scope="module")
def projected_run(tmp_path_factory):
    """A folder with a projected student, whose name needs quoting in a shell, and the output of the run."""
    folder = tmp_path_factory.mktemp("start") / "it's a $HOME"
    process = run_script(TRAIN, "--output_dir", folder, *SHORT_RUN, "--project_only")
    assert process.returncode == 0, process.stderr
    return folder, process.stdout


def test_project_only_prints_no_training_and_ends_with_the_inference_command(projected_run):
    folder, printed = projected_run
    assert not any(word in printed for word in ("teacher images", "steps", "minutes", "trajectories"))
    *_, saved, then = printed.splitlines()
    assert saved == f"saved to {folder}, projected and not trained"
    assert shlex.split(then) == ["next:", "python", "run_inference.py", "--model", str(folder)]
    run = read_run(folder)
    assert (
        not run["finished"]
        and run["schedule"]["few_steps"] is None
        and not any(run["schedule"]["phases"].values())
    )
    assert f"{shlex.quote(str(folder))} --prompt" in (folder / "README.md").read_text()
    assert repr(str(folder)) in (folder / "README.md").read_text()


def test_a_saved_initialization_equals_step_0_of_a_run_in_its_folder(projected_run, tmp_path):
    shutil.copytree(projected_run[0], tmp_path / "run")
    inference = run_script(
        GENERATE, "--model", tmp_path / "run", "--output_dir", tmp_path / "images", "--batch_size", "8"
    )
    assert inference.returncode == 0, inference.stderr
    generated = [np.asarray(Image.open(path)) for path in sorted((tmp_path / "images").glob("0*.png"))]
    training = run_script(
        TRAIN,
        "--output_dir",
        tmp_path / "run",
        *SHORT_RUN,
        "--few_step_train_steps",
        "0",
        "--matching_steps",
        "0",
    )
    assert training.returncode == 0 and "energy kept" not in training.stdout, training.stderr
    grid = np.asarray(Image.open(tmp_path / "run/samples/step-000000.png"))
    assert len(generated) == len(read_run(projected_run[0])["validation_prompts"])
    for column, image in enumerate(generated):
        left, top = locate(1, column, (CELL, CELL))  # the student's row
        assert (grid[top : top + CELL, left : left + CELL] == enlarge(image)).all()
    assert read_run(tmp_path / "run")["finished"] and "projected_only" not in read_run(tmp_path / "run")


def test_stock_diffusers_loads_a_saved_initialization(projected_run):
    ours, stock = (
        kind.from_pretrained(projected_run[0]).state_dict()
        for kind in (WanLiteStudent, WanTransformer3DModel)
    )
    assert ours.keys() == stock.keys() and all(
        torch.equal(tensor, stock[name]) for name, tensor in ours.items()
    )
    assert WanPipeline.from_pretrained(projected_run[0]).scheduler.config.solver_order == 2


def test_project_only_does_not_replace_an_interrupted_run(finished_run, tmp_path):
    run = read_run(finished_run[0])
    write_json(
        tmp_path / "run.json",
        run | {"finished": False, "settings": run["settings"] | {"output_dir": str(tmp_path)}},
    )
    printed = read_refusal(TRAIN, "--output_dir", tmp_path, *SHORT_RUN, "--project_only")
    assert "holds an interrupted run. Leave --project_only out" in printed
    assert read_run(tmp_path)["finished"] is False


def test_a_dry_run_over_a_finished_run_prints_the_plan_and_then_the_problem(finished_run):
    process = run_script(TRAIN, "--output_dir", finished_run[0], *SHORT_RUN, "--dry_run")
    assert process.returncode == 2 and process.stdout.startswith("teacher  ")
    problem, run = process.stdout.splitlines()[-2:]
    assert problem.startswith(f"PROBLEM  {finished_run[0]}: holds a finished run") and run.startswith(
        "run      python"
    )
    assert process.stdout.count("PROBLEM") == 1 and "Traceback" not in process.stderr


def test_a_dry_run_of_project_only_plans_no_training(tmp_path):
    process = run_script(TRAIN, "--output_dir", tmp_path / "run", *SHORT_RUN, "--dry_run", "--project_only")
    assert process.returncode == 0 and "saved untrained" in process.stdout, process.stderr
    assert not any(
        word in process.stdout.partition("run      ")[0]
        for word in ("teacher images", "training", "trajectories")
    )


@pytest.mark.parametrize(
    "content, words", [(b"", "holds no prompt"), (b"\n  \n", "holds no prompt"), (b"\xff\xfe\x00", "UTF-8")]
)
def test_a_prompt_file_without_prompts_is_refused(content, words, tmp_path):
    (tmp_path / "prompts.txt").write_bytes(content)
    assert words in read_refusal(
        TRAIN, "--output_dir", tmp_path / "run", "--prompts", tmp_path / "prompts.txt"
    )


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--hidden_size", "256"], "hidden_size 256 is more than the teacher's 128"),
        (["--num_heads", "3"], "3 heads of 21.3333 channels cannot be pruned"),
        (["--depth", "9"], "depth 9 is more"),
    ],
)
def test_an_impossible_shape_is_refused_before_any_write(arguments, words, tmp_path):
    process = run_script(TRAIN, "--output_dir", tmp_path / "run", *arguments)
    assert (
        process.returncode == 2
        and words in process.stderr.splitlines()[-1]
        and "Traceback" not in process.stderr
    )
    assert not list((tmp_path / "run").iterdir())


def test_an_impossible_shape_leaves_the_run_to_overwrite_unchanged(finished_run, tmp_path):
    shutil.copytree(finished_run[0], tmp_path / "run")
    process = run_script(TRAIN, "--output_dir", tmp_path / "run", "--overwrite", "--num_heads", "3")
    assert process.returncode == 2
    assert (tmp_path / "run/diffusion_pytorch_model.safetensors").is_file() and (
        tmp_path / "run/run.json"
    ).is_file()


def test_a_failure_before_the_first_step_leaves_the_run_to_overwrite_unchanged(finished_run, tmp_path):
    shutil.copytree(finished_run[0], tmp_path / "run")
    before = {
        path: path.read_bytes()
        for path in (tmp_path / "run").rglob("*")
        if path.is_file() and "cache" not in path.parts
    }
    shard = max((tmp_path / "run/cache").glob("trajectories-*/shard-*"), key=lambda path: path.stat().st_size)
    shard.unlink()
    shard.mkdir()  # the error occurs when the images are opened, just before the first step
    process = run_script(TRAIN, "--output_dir", tmp_path / "run", "--overwrite", *SHORT_RUN)
    assert process.returncode == 2 and shard.name in process.stderr and "Traceback" not in process.stderr
    assert {path: path.read_bytes() for path in before} == before


def test_a_folder_of_other_content_is_never_written_to(tmp_path):
    (tmp_path / "letter.txt").write_text("dear")
    assert "files that do not belong to a run" in read_refusal(TRAIN, "--output_dir", tmp_path, "--overwrite")
    assert [path.name for path in tmp_path.iterdir()] == ["letter.txt"]


def test_a_finished_run_is_not_overwritten_by_accident(finished_run):
    folder, _ = finished_run
    before = (folder / "diffusion_pytorch_model.safetensors").read_bytes()
    assert "--overwrite" in read_refusal(TRAIN, "--output_dir", folder, *SHORT_RUN)
    assert (folder / "diffusion_pytorch_model.safetensors").read_bytes() == before


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--prompt", ""], "no prompt"),
        (["--prompts_file", "/no/such.txt"], "no such file"),
        (["--prompt", "x", "--prompts_file", "y"], "choose one"),
        (["--height", "100"], "divisible by 16; the nearest is 96"),
        (["--width", "0"], "divisible by 16"),
        (["--num_inference_steps", "0"], "at least 1"),
        (["--device", "gpu"], "is unknown"),
        (["--dtype", "int8"], "invalid choice"),
        (["--negative_prompt", "blur"], "add --guidance_scale"),
        (["--guidance_scale", "nan"], "expected 1"),
        (["--num_images_per_prompt", "-1"], "at least 1"),
    ],
)
def test_inference_rejects_wrong_arguments_in_one_line(arguments, words, finished_run, tmp_path):
    folder, _ = finished_run
    assert words in read_refusal(GENERATE, "--model", folder, "--output_dir", tmp_path / "images", *arguments)
    assert not (tmp_path / "images").exists()


@pytest.mark.parametrize(
    "model, words",
    [
        ("/no/such/run", "no such folder"),
        (str(ROOT / "README.md"), "not a folder"),
        (str(ROOT / "tests"), "no config.json"),
        (str(TINY_TEACHER / "vae"), "AutoencoderKLWan"),
        (str(TINY_TEACHER / "transformer"), "lacks scheduler"),
        ("", "is not the name of a folder"),
    ],
)
def test_inference_rejects_a_folder_without_a_student(model, words, tmp_path):
    assert words in read_refusal(GENERATE, "--model", model, "--output_dir", tmp_path / "images")


def test_an_unfinished_run_is_not_a_model(finished_run, tmp_path):
    shutil.copytree(finished_run[0], tmp_path / "run")
    (tmp_path / "run/diffusion_pytorch_model.safetensors").unlink()
    assert "Error no file named" in read_refusal(GENERATE, "--model", tmp_path / "run")


def test_a_missing_device_is_refused(finished_run):
    process = run_script(GENERATE, "--model", finished_run[0], "--device", "cuda:7")
    assert process.returncode == 2 and "CUDA devices. Leave the flag out" in process.stderr.splitlines()[-1]


def test_a_prompt_file_trains_and_its_last_prompts_are_held_out(tmp_path):
    prompts = [f"prompt number {number} of a user" for number in range(60)]
    (tmp_path / "prompts.txt").write_text("\n".join([*prompts, "", prompts[0]]))
    process = run_script(
        TRAIN,
        "--output_dir",
        tmp_path / "run",
        "--prompts",
        tmp_path / "prompts.txt",
        "--projection",
        "weights",
        "--gradient_accumulation_steps",
        "2",
        "--mixed_precision",
        "bf16",
        "--gradient_checkpointing",
        "--no-use_ema",
        "--muon_learning_rate",
        "0",
        "--feature_directions",
        "5",
        *SHORT_RUN,
    )
    assert process.returncode == 0, process.stderr
    kept = [load_file(path) for path in tmp_path.glob("run/cache/trajectories-*/*.safetensors")]
    assert kept and {shard["features"].shape[-1] for shard in kept} == {5}
    run = json.loads((tmp_path / "run/run.json").read_text())
    assert run["finished"] and run["validation_prompts"] == [*prompts[-3:], prompts[0]]
    assert "prompt_accuracy" not in run["results"] and 0 < run["results"]["held_out_error"] < 2
    records = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records if "held_out_error" in record] == [0, 3, 6]


LAUNCH = (
    "-m",
    "accelerate.commands.launch",
    "--multi_gpu",
    "--num_processes",
    "2",
    "--num_machines",
    "1",
    "--mixed_precision",
    "no",
    "--dynamo_backend",
    "no",
    TRAIN,
)  # with --cpu, accelerate starts one process for any number


@pytest.mark.slow
def test_two_processes_train_one_student(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    process = run_script(*LAUNCH, "--output_dir", tmp_path / "run", *SHORT_RUN)
    assert process.returncode == 0, process.stderr
    assert process.stdout.count("held-out captions drawn right") == 1
    run = json.loads((tmp_path / "run/run.json").read_text())
    assert run["finished"] and run["processes"] == 2


@pytest.mark.skipif(torch.accelerator.device_count() > 1, reason="this machine has as many GPUs")
def test_more_processes_than_gpus_are_rejected_by_one_of_them(tmp_path):
    printed = run_script(*LAUNCH, "--output_dir", tmp_path / "run", *SHORT_RUN).stderr
    assert (
        printed.count("torch finds") == 1
        and "set ACCELERATE_USE_CPU=true" in printed
        and "wanlite/" not in printed
    )


def test_the_output_of_both_scripts_reports_progress_and_paths(finished_run):
    folder, printed = finished_run
    lines = printed.splitlines()
    named = {line[:8].rstrip(): line[9:] for line in reversed(lines) if line[8:9] == " " and line[0] != " "}
    assert lines[0].startswith("teacher") and "tiny_teacher" in lines[0]
    assert lines[1] == "         diffusers layout, 2 experts of 1.25 million parameters"
    assert named["student"].startswith("0.33 million") and named["start"] == "projection calibrated"
    assert named["output"] == str(folder) and "minute" in named["time"] and "device" in named
    assert named["noise"].startswith("shift 3 for 64 x 64 pixels: 3 teacher steps with the high")
    few = "64 trajectories are few, and images may stay noise; the default is at least 300"
    assert named["WARNING"] == few and named["verdict"].startswith("failed: ")
    assert max(len(line) for line in lines if str(folder) not in line) <= 100
    assert lines[-1] == f"next: python run_inference.py --model {folder}"
    results = json.loads((folder / "run.json").read_text())["results"]
    assert results["captions"] == 16 and 0.9 < results["prompt_accuracy"]["teacher"] <= 1


def test_the_dry_run_counts_truncated_prompts(tmp_path):
    (tmp_path / "prompts.txt").write_text(
        "a small red circle\n" * 3 + "a small red circle " * 300 + "\na large blue ring\n"
    )
    process = run_script(
        TRAIN, "--dry_run", "--prompts", tmp_path / "prompts.txt", "--output_dir", tmp_path / "run"
    )
    assert process.stdout.count("prompts truncated to the limit of 512 tokens: 1, first 'a small red") == 1
