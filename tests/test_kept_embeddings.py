"""Embeddings of prompts on disk: equal to encoded ones, and never those of another encoder."""

import os
import shutil
import stat
from functools import partial

import pytest
import torch

from wanlite.data import kept_embeddings
from wanlite.data.kept_embeddings import digest_encoder, encode_or_read, kept_folder
from wanlite.generation.student import encode_once

PROMPTS = ["a small red ring", "a large blue cross above a small green square"]


@pytest.fixture
def student(finished_run, tmp_path):
    for name in ("text_encoder", "tokenizer"):
        shutil.copytree(finished_run[0] / name, tmp_path / "student" / name)
    return tmp_path / "student"


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def encode(student):
    """Encode prompts; the second value is a list of all that were encoded."""
    encoded = []

    def encode(prompts):
        encoded.extend(prompts)
        return encode_once(student, "cpu", prompts)

    return encode, encoded


def embed(student, prompts, encode, min_encoder_bytes=0):
    return encode_or_read(student, "cpu", prompts, encode, min_encoder_bytes)


def are_equal(found, expected):
    return found.keys() == expected.keys() and all(map(torch.equal, found.values(), expected.values()))


def test_a_prompt_that_was_drawn_before_needs_no_text_encoder(student, home, encode):
    expected = embed(student, PROMPTS, encode[0])
    assert are_equal(embed(student, [*PROMPTS, PROMPTS[0]], None), expected)
    embed(student, [PROMPTS[0], "another"], encode[0])
    assert encode[1] == [*PROMPTS, "another"]
    assert stat.S_IMODE(kept_folder().stat().st_mode) == 0o700
    assert len(list(kept_folder().iterdir())) == 3 and PROMPTS[0] not in str(list(home.rglob("*")))


def test_another_encoder_tokenizer_or_library_is_encoded_again(student, home, encode, monkeypatch):
    embed(student, PROMPTS[:1], encode[0])
    for name in ("text_encoder/config.json", "tokenizer/tokenizer_config.json"):
        (student / name).write_text((student / name).read_text() + "\n")
        for folder in ("text_encoder", "tokenizer"):
            (student / folder / "manifest.json").unlink(missing_ok=True)
        embed(student, PROMPTS[:1], encode[0])
    assert encode[1] == PROMPTS[:1] * 3
    digests = {digest_encoder(student, device) for device in ("cpu", "cuda", "cuda:1")}
    monkeypatch.setattr(torch, "__version__", "1.0")
    assert len(digests | {digest_encoder(student, "cpu")}) == 3


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "folder", "renamed"])
def test_a_damaged_file_is_encoded_again(damage, student, home, encode):
    expected = embed(student, PROMPTS, encode[0])
    path, other = kept_folder().iterdir()
    content = path.read_bytes()
    if damage == "folder":
        path.unlink()
        path.mkdir()
    elif damage == "renamed":
        other.replace(path)
    else:
        changed = {"flip": content[:-1] + bytes([content[-1] ^ 1]), "cut": content[:-8], "empty": b""}
        path.write_bytes(changed[damage])
    # the last bits depend on the prompts that are encoded together
    found = embed(student, PROMPTS, encode[0])
    assert all(torch.allclose(found[prompt], expected[prompt], atol=1e-5) for prompt in PROMPTS)
    assert len(encode[1]) in (3, 4)


def test_a_small_encoder_and_a_truncated_prompt_are_not_kept(student, home, encode):
    embed(student, PROMPTS, encode[0], 2**30)
    assert not home.exists()
    embed(student, ["a red ring " * 300], encode[0])
    assert not list(kept_folder().iterdir())


def test_a_home_that_cannot_be_written_to_changes_nothing(student, home, encode):
    home.write_text("a file")
    assert embed(student, PROMPTS, encode[0]).keys() == {*PROMPTS}


def test_the_files_that_were_not_used_for_longest_are_deleted(student, home, encode, monkeypatch):
    embed(student, PROMPTS[:1], encode[0])
    (size,) = (path.stat().st_size for path in kept_folder().iterdir())
    monkeypatch.setattr(kept_embeddings, "MAX_KEPT_BYTES", int(2.5 * size))
    for prompt in ("a small red dot", PROMPTS[0], "a small red bar"):
        for path in kept_folder().iterdir():  # the clock of a file system may stand still between two uses
            used = path.stat().st_mtime - 1
            os.utime(path, (used, used))
        embed(student, [prompt], encode[0])
    embed(student, PROMPTS[:1], partial(pytest.fail, "was deleted"))
