"""Converted parts of a teacher: made once for all runs of a user, unless --cache_dir is set."""

import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from train_distillation import Settings
from wanlite.files.cache import is_writable, user_cache
from wanlite.planning.resolve import complete
from wanlite.training.run_folder import converted_folder


def settings_of(tmp_path, cache_dir=None):
    return complete(Settings(output_dir=str(tmp_path / "out"), cache_dir=cache_dir, report_to="none"))


def test_two_runs_share_converted_parts_by_default(tmp_path):
    first, second = (converted_folder(settings_of(tmp_path / name)) for name in "ab")
    assert first == second == user_cache() == Path(os.environ["WANLITE_CACHE"])


def test_a_cache_dir_and_several_machines_keep_the_parts_together(tmp_path, monkeypatch):
    cache = str(tmp_path / "shared")
    assert converted_folder(settings_of(tmp_path, cache)) == Path(cache)
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert converted_folder(settings_of(tmp_path)) == tmp_path / "out/cache"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert converted_folder(settings_of(tmp_path)) == user_cache()


def test_a_user_cache_that_cannot_be_written_is_not_used(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("WANLITE_CACHE", str(tmp_path / "file" / "cache"))
    settings = SimpleNamespace(output_dir=str(tmp_path / "out"), cache_dir=str(tmp_path / "out/cache"))
    assert converted_folder(settings) == tmp_path / "out/cache"
    assert is_writable(tmp_path / "new/folder") and not is_writable(tmp_path / "file")


@pytest.mark.parametrize(
    "environment, expected",
    [
        ({"WANLITE_CACHE": "~/mine"}, "home/mine"),
        ({"XDG_CACHE_HOME": "{}/xdg"}, "xdg/wanlite"),
        ({}, "home/.cache/wanlite"),
    ],
)
def test_the_user_cache_follows_the_environment(environment, expected, tmp_path, monkeypatch):
    for name in ("WANLITE_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name, value in environment.items():
        monkeypatch.setenv(name, value.format(tmp_path))
    assert user_cache() == tmp_path / expected
