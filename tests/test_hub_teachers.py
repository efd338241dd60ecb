"""--teacher organisation/model against a local hub: the needed files are downloaded once, and resumed."""

import shutil

import huggingface_hub
import pytest

from tests.conftest import TINY_TEACHER
from tests.test_student_saving import hub  # noqa: F401  (a fixture)
from train_distillation import Settings
from wanlite.planning.hub import download_teacher, is_whole
from wanlite.planning.resolve import complete

NAME = "org/wan"


@pytest.fixture
def hub_with_teacher(hub, tmp_path, monkeypatch):  # noqa: F811
    """The hub with the tiny teacher and files that a student does not need; its cache is empty."""
    shutil.copytree(TINY_TEACHER, hub.folder / NAME)
    (hub.folder / NAME / "assets").mkdir()
    for name in ("assets/video.mp4", "pytorch_model.bin", "transformer/model.fp16.safetensors"):
        (hub.folder / NAME / name).write_bytes(b"x")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    hub.cache = tmp_path / "cache/models--org--wan"
    return hub


def downloaded(hub):  # noqa: F811
    return [path for path in hub.requested if "/resolve/" in path]


def snapshot_of(hub):  # noqa: F811
    (found,) = (hub.cache / "snapshots").glob("*")
    return found


def test_a_teacher_is_downloaded_once_after_its_size_is_printed(hub_with_teacher, capsys):
    settings = complete(Settings(teacher=NAME, report_to="none"))
    printed = capsys.readouterr().out
    assert printed.startswith(f"download {NAME}: 1") and "MB in" in printed and "free)" in printed
    snapshot = snapshot_of(hub_with_teacher)
    assert settings.teacher == str(snapshot) and is_whole(snapshot)
    assert not [
        name for name in downloaded(hub_with_teacher) if "mp4" in name or ".bin" in name or "fp16" in name
    ]
    hub_with_teacher.requested.clear()
    assert complete(Settings(teacher=NAME, report_to="none")).teacher == str(snapshot)
    assert not hub_with_teacher.requested and not capsys.readouterr().out


def test_an_incomplete_download_is_resumed(hub_with_teacher):
    download_teacher(NAME, lambda line: None)
    (lost,) = (snapshot_of(hub_with_teacher) / "transformer_2").glob("*.safetensors")
    lost.resolve().unlink(), lost.unlink()
    assert not is_whole(snapshot_of(hub_with_teacher))
    lines = []
    download_teacher(NAME, lines.append)
    assert is_whole(snapshot_of(hub_with_teacher)) and " in 1 files to " in lines[0]


def test_a_dry_run_downloads_nothing(hub_with_teacher):
    with pytest.raises(OSError, match=r"Download the model with `hf download org/wan"):
        complete(Settings(teacher=NAME, report_to="none", dry_run=True))
    assert not hub_with_teacher.requested


def test_a_disk_that_is_too_small_is_refused_before_the_download(hub_with_teacher, monkeypatch):
    monkeypatch.setattr("wanlite.planning.hub.count_free_bytes", lambda folder: 10**6)
    with pytest.raises(OSError, match=r"are to be downloaded to .*, and 1.0 MB are free. Set HF_HOME"):
        download_teacher(NAME)
    assert not list(hub_with_teacher.cache.glob("blobs/*"))


def test_a_model_without_a_wan_is_refused_before_the_download(hub_with_teacher):
    shutil.rmtree(hub_with_teacher.folder / NAME / "transformer")
    with pytest.raises(OSError, match="has no Wan in the diffusers layout or in Wan's own"):
        download_teacher(NAME)
    assert not list(hub_with_teacher.cache.glob("blobs/*"))


@pytest.mark.parametrize("typed", ["org/none", "https://huggingface.co/org/none"])
def test_an_unknown_name_is_refused_in_one_line(typed, hub_with_teacher):
    with pytest.raises(
        OSError, match="no such model on the hub. .*`hf download org/none --local-dir ./none`"
    ) as end:
        download_teacher(typed)
    assert "\n" not in str(end.value)


def test_a_hub_that_cannot_be_reached_is_named_in_one_line(hub_with_teacher):
    hub_with_teacher.stop()
    with pytest.raises(OSError, match="the hub cannot be read .*`hf download org/wan") as end:
        download_teacher(NAME)
    assert "\n" not in str(end.value)


@pytest.mark.parametrize(
    "typed", ["./org/wan", "/org/wan", "~/wan", "outputs/wan", "a/b/c", "wan", None, "there/wan"]
)
def test_a_path_never_reaches_the_network(typed, hub_with_teacher, tmp_path):
    (tmp_path / "here/there").mkdir()
    download_teacher(typed)
    assert not hub_with_teacher.requested


def test_wrong_settings_are_refused_before_a_download(hub_with_teacher):
    with pytest.raises(ValueError, match="--max_train_steps is 0"):
        complete(Settings(teacher=NAME, max_train_steps=0))
    assert not hub_with_teacher.requested
