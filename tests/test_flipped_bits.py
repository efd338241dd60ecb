"""One flipped bit in a file of a run's folder: the run resumes to the same weights, or names the file."""

import shutil
import signal

import pytest
from safetensors import safe_open
from safetensors.torch import save_file

from tests.conftest import ROOT, run_script
from tests.test_resuming import have_equal_weights, train
from train_distillation import WanLiteStudent
from wanlite.files.atomic import write_json
from wanlite.files.file_names import BASE, COMPONENTS, RUN, WEIGHTS
from wanlite.training.run_folder import SEAL, read_run

EVERY_STEP = ("--checkpointing_steps", "1")
AGAIN, REFUSED, SAME = "computed again", "exit code 2", "no influence"
KINDS = {  # {file of a killed run: the effect of a flipped bit}
    "cache/text-*/shard-*": AGAIN,
    "cache/trajectories-*/shard-*": AGAIN,
    "cache/basis-*/shard-*": AGAIN,
    "cache/rollouts-*/shard-*": REFUSED,
    "cache/trajectories-*/provenance.json": REFUSED,
    "cache/start-*/*.safetensors": SAME,  # projected again where it is needed
    "cache/start-*/report.json": SAME,
    "cache/experts-*.json": SAME,
    "checkpoints/step-*/state.safetensors": SAME,  # an earlier checkpoint is used
    "checkpoints/step-*/state.json": SAME,
    "checkpoints/step-*/manifest.json": SAME,
    "metrics.jsonl": SAME,
}


@pytest.fixture(scope="module")
def killed(finished_run, tmp_path_factory):
    """A run of the same settings that was killed after its student rolled out."""
    folder = tmp_path_factory.mktemp("killed") / "run"
    shutil.copytree(finished_run[0] / "cache", folder / "cache")
    train(folder, *EVERY_STEP, at={6: lambda: signal.raise_signal(signal.SIGKILL)})
    return folder


@pytest.fixture
def resumable(killed, tmp_path):
    return shutil.copytree(killed, tmp_path / "run")


def flip(path, share=0.6):
    """Flip the lowest bit of a byte at `share` of a file."""
    content = bytearray(path.read_bytes())
    content[int(share * len(content))] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("kind", KINDS)
def test_a_flipped_bit_of_a_killed_run_is_noticed_or_changes_nothing(kind, resumable, finished_run):
    paths = sorted(resumable.glob(kind))
    for path in paths if kind.startswith("cache") else paths[-1:]:  # the newest checkpoint
        flip(path)
    code, printed = train(resumable, *EVERY_STEP)
    is_named = any(str(path) in printed or str(path.parent) in printed for path in paths)
    if KINDS[kind] == REFUSED:
        assert code == 2 and is_named
    else:
        assert code == 0 and have_equal_weights(resumable, finished_run[0])
        assert is_named or KINDS[kind] == SAME


def test_flipped_settings_that_a_run_adapted_are_refused(resumable):
    text = (resumable / RUN).read_text()
    assert '"train_batch_size": 16' in text.partition('"fitted"')[2]
    head, mark, fitted = text.partition('"fitted"')
    (resumable / RUN).write_text(
        head + mark + fitted.replace('"train_batch_size": 16', '"train_batch_size": 17', 1)
    )
    code, printed = train(resumable, *EVERY_STEP)
    assert code == 2 and "run.json: fitted differs from its sha256" in printed


@pytest.mark.parametrize("component", COMPONENTS)
def test_a_flipped_bit_of_a_component_is_refused_at_drawing(component, finished_run, tmp_path):
    folder = shutil.copytree(
        finished_run[0], tmp_path / "run", ignore=shutil.ignore_patterns("cache", "checkpoints")
    )
    path = max((folder / component).iterdir(), key=lambda entry: entry.stat().st_size)
    flip(path)
    process = run_script(
        ROOT / "run_inference.py",
        "--model",
        folder,
        "--prompt",
        "a red ring",
        "--output_dir",
        tmp_path / "out",
    )
    assert process.returncode == 2 and f"{path.name} differs from its manifest" in process.stderr
    assert not list(tmp_path.glob("out/*.png"))


# ---- drawing -----------------------------------------------------------------------------------------------


@pytest.fixture
def student_folder(finished_run, tmp_path):
    return shutil.copytree(
        finished_run[0], tmp_path / "student", ignore=shutil.ignore_patterns("cache", "checkpoints")
    )


@pytest.mark.parametrize("place", ["", BASE])
@pytest.mark.parametrize("share", [0.3, 0.6, 0.999])
def test_a_flipped_bit_of_weights_is_refused_at_loading(share, place, student_folder):
    folder = student_folder / place
    assert WanLiteStudent.from_pretrained(folder)
    flip(folder / WEIGHTS, share)
    with pytest.raises(OSError, match=f"{WEIGHTS}: its tensors differ from the checksum"):
        WanLiteStudent.from_pretrained(folder)


def change(path, how, metadata):
    with safe_open(path, "pt") as file:
        tensors = {name: how(file.get_tensor(name)) for name in file.keys()}
        save_file(tensors, path, metadata(file.metadata()))


@pytest.mark.parametrize(
    "how, metadata",
    [
        (lambda tensor: tensor * 2, lambda found: {"format": "pt"}),
        (lambda tensor: tensor * 2, lambda found: None),
        (lambda tensor: tensor.bfloat16(), lambda found: found),
        (lambda tensor: tensor, lambda found: found),
    ],
)
def test_weights_that_other_programs_saved_are_accepted(how, metadata, student_folder):
    change(student_folder / WEIGHTS, how, metadata)
    assert WanLiteStudent.from_pretrained(student_folder)


def test_a_changed_student_is_saved_with_its_own_checksum(student_folder):
    student = WanLiteStudent.from_pretrained(student_folder)
    student.proj_out.weight.data += 1
    student.save_pretrained(student_folder)
    for dtype in (None, "bfloat16"):
        assert WanLiteStudent.from_pretrained(student_folder, dtype=dtype)
    student.save_pretrained(student_folder / "shards", max_shard_size=10**5)
    assert WanLiteStudent.from_pretrained(student_folder / "shards")


@pytest.mark.parametrize("name, value", [("resolution", 80), ("validation_prompts", ["a red rinf"])])
def test_a_plausible_value_that_a_run_did_not_record_is_refused(name, value, student_folder):
    run = read_run(student_folder)
    write_json(student_folder / RUN, run | {name: value})
    with pytest.raises(OSError, match="run.json: resolution or .* differs from its sha256"):
        read_run(student_folder)
    write_json(student_folder / RUN, {key: each for key, each in run.items() if key != SEAL} | {name: value})
    assert read_run(student_folder)[name] == value
