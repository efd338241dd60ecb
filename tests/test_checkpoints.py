"""Checkpoints: the full state is restored, the newest valid one is used, and a failed save loses nothing."""

import json
import pickle
import shutil
import signal
import subprocess
import sys

import pytest
import torch

from tests.conftest import ROOT, Payload
from wanlite.files.atomic import read_manifest, write_json
from wanlite.training.checkpoints import checkpoint_path, latest_checkpoint, load_checkpoint, save_checkpoint


def save(folder, step, value=0.0, keep=9):
    save_checkpoint(
        folder, step, {"weight": torch.full((100,), float(value)), "step": step}, {"seed": 0}, keep
    )


def steps(folder):
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def test_optimizers_schedules_and_counters_are_restored_bit_for_bit(tmp_path):
    torch.manual_seed(0)
    network = torch.nn.Linear(3, 3)
    optimizers = [torch.optim.AdamW([network.bias], lr=0.1), torch.optim.Muon([network.weight], lr=0.3)]
    rate = torch.optim.lr_scheduler.LambdaLR(optimizers[0], lambda step: 1 / 3 / (step + 1))
    for _ in range(3):
        network(torch.randn(2, 3)).square().sum().backward()
        for optimizer in optimizers:
            optimizer.step()
        rate.step()
    state = {
        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
        "rate": rate.state_dict(),
        "step": 3,
        "network": network.state_dict(),
        "nothing": None,
        "shares": [0.1, 1e-300, 2**53 + 1],
    }
    save_checkpoint(tmp_path, 3, state, {}, 2)
    found = load_checkpoint(checkpoint_path(tmp_path, 3))
    first, second = torch.optim.AdamW([network.bias], lr=9.0), torch.optim.Muon([network.weight], lr=9.0)
    first.load_state_dict(found["optimizers"][0])
    second.load_state_dict(found["optimizers"][1])
    assert torch.equal(
        first.state[network.bias]["exp_avg_sq"], optimizers[0].state[network.bias]["exp_avg_sq"]
    )
    assert torch.equal(
        second.state[network.weight]["momentum_buffer"],
        optimizers[1].state[network.weight]["momentum_buffer"],
    )
    assert (
        first.param_groups[0]["lr"] == optimizers[0].param_groups[0]["lr"] and found["rate"] == state["rate"]
    )
    assert all(torch.equal(tensor, found["network"][name]) for name, tensor in network.state_dict().items())
    assert (found["step"], found["nothing"], found["shares"]) == (3, None, state["shares"])


def test_no_file_of_a_checkpoint_is_a_pickle(tmp_path):
    save(tmp_path, 1)
    assert {path.name for path in checkpoint_path(tmp_path, 1).iterdir()} == {
        "manifest.json",
        "state.json",
        "state.safetensors",
    }


@pytest.mark.parametrize(
    "break_it, reason",
    [
        (lambda path: (path / "state.safetensors").write_bytes(b"cut"), "differs from its manifest"),
        (lambda path: (path / "state.json").unlink(), "lacks state.json"),
        (lambda path: (path / "manifest.json").unlink(), "no readable manifest"),
        (lambda path: write_json(path / "manifest.json", read_manifest(path) | {"step": 7}), "is of step 7"),
    ],
)
def test_the_newest_valid_checkpoint_is_used_and_skipped_ones_are_reported(tmp_path, break_it, reason):
    save(tmp_path, 1)
    save(tmp_path, 2)
    break_it(checkpoint_path(tmp_path, 2))
    path, skipped = latest_checkpoint(tmp_path)
    assert path == checkpoint_path(tmp_path, 1) and len(skipped) == 1 and reason in skipped[0]
    save(tmp_path, 2, 5.0)  # a resumed run replaces it
    assert latest_checkpoint(tmp_path) == (checkpoint_path(tmp_path, 2), [])


def test_a_checkpoint_renamed_to_another_step_is_skipped(tmp_path):
    save(tmp_path, 1)
    checkpoint_path(tmp_path, 1).rename(checkpoint_path(tmp_path, 900))
    path, skipped = latest_checkpoint(tmp_path)
    assert path is None and "is of step 1" in skipped[0]


def test_an_intact_but_invalid_state_is_an_error_that_names_it(tmp_path):
    save(tmp_path, 1)
    path = checkpoint_path(tmp_path, 1)
    for content in ("{", '{"pairs": [["a", {"tensor": "none"}]]}', '{"pairs": 3}'):
        (path / "state.json").write_text(content)
        with pytest.raises(OSError, match="step-000001: cannot be read back"):
            load_checkpoint(path)


@pytest.mark.parametrize("name", ["state.safetensors", "state.json", "optimizer.bin"])
def test_a_pickle_in_a_checkpoint_is_never_opened(tmp_path, name):
    save(tmp_path, 1)
    path = checkpoint_path(tmp_path, 1)
    (path / name).write_bytes(pickle.dumps(Payload(tmp_path / "executed")))
    if name == "optimizer.bin":
        assert load_checkpoint(path)["step"] == 1
    else:
        with pytest.raises(OSError, match="step-000001: cannot be read back"):
            load_checkpoint(path)
    assert not (tmp_path / "executed").exists()


def test_at_least_two_checkpoints_are_kept_and_other_files_are_untouched(tmp_path):
    for step in (999_997, 999_998):
        save(tmp_path, step)
    shutil.copytree(checkpoint_path(tmp_path, 999_998), tmp_path / "checkpoints/step-best")
    (tmp_path / "checkpoints/.step-000123.partial").mkdir()
    save(tmp_path, 999_999)
    save(tmp_path, 1_000_000, keep=1)
    assert steps(tmp_path) == ["step-1000000", "step-999999", "step-best"]
    assert latest_checkpoint(tmp_path) == (checkpoint_path(tmp_path, 1_000_000), [])


def test_a_kill_during_a_save_leaves_the_last_complete_checkpoint(tmp_path):
    code = (
        "import sys, time; sys.path.insert(0, sys.argv[1])\n"
        "from pathlib import Path; from tests.test_checkpoints import save; import wanlite.training.checkpoints as "
        "checkpoints\n"
        "save(Path(sys.argv[2]), 1)\n"
        "def slow(tensors, path): path.write_text('half'); print('saving', flush=True); time.sleep(60)\n"
        "checkpoints.save_file = slow; save(Path(sys.argv[2]), 2)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, ROOT, tmp_path], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "saving\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert latest_checkpoint(tmp_path) == (checkpoint_path(tmp_path, 1), [])
    save(tmp_path, 2)
    assert steps(tmp_path) == ["step-000001", "step-000002"]


def test_a_disk_that_fills_during_a_save_leaves_the_earlier_checkpoint(small_disk, monkeypatch):
    save(small_disk, 1)
    monkeypatch.setattr(
        "wanlite.training.checkpoints.check_space", lambda *_: None
    )  # the free space was sufficient before the save
    with pytest.raises(OSError, match="step-000002: .*No space left"):
        save_checkpoint(small_disk, 2, {"weight": torch.zeros(10**6)}, {}, 2)
    assert steps(small_disk) == ["step-000001"] and latest_checkpoint(small_disk) == (
        checkpoint_path(small_disk, 1),
        [],
    )


@pytest.mark.parametrize("failure", [OSError("disk full"), FloatingPointError("holds NaN")])
def test_a_save_that_fails_deletes_nothing(tmp_path, failure, monkeypatch):
    for step in (1, 2):
        save(tmp_path, step)
    if isinstance(failure, OSError):
        monkeypatch.setattr(
            "wanlite.training.checkpoints.save_file", lambda *_: (_ for _ in ()).throw(failure)
        )
    with pytest.raises(type(failure), match=str(failure)):
        save(tmp_path, 3, value=0.0 if isinstance(failure, OSError) else float("nan"), keep=2)
    assert steps(tmp_path) == ["step-000001", "step-000002"]
    assert json.loads((checkpoint_path(tmp_path, 2) / "state.json").read_text())
