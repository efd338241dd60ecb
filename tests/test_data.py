"""Trajectories on disk and the order in which they are dealt out."""

import pytest
import torch

from wanlite.data import SeededBatches, Trajectories, cache_folder, shard_path, write_shard


def write_numbered(folder, sizes, states=3):
    """Write shards whose every value is the number of its state."""
    first = 0
    for index, size in enumerate(sizes):
        number = torch.arange(first, first + size * states, dtype=torch.float32).view(size, states)
        write_shard(folder, index, {"timestep": number, "latents": number[..., None].half(),
                                    "prompt": torch.arange(first, first + size * states, states) // states})
        first += size * states


def test_a_batch_is_the_named_states_in_the_named_order(tmp_path):
    write_numbered(tmp_path, (4, 2, 5))
    states = Trajectories(tmp_path, 3)
    numbers = [32, 0, 13, 12, 11, 17, 18, 0]
    batch = states.__getitems__(numbers)
    assert len(states) == 33 and batch["timestep"].tolist() == numbers
    assert batch["latents"].flatten().tolist() == numbers and batch["prompt"].tolist() == [number // 3 for number in numbers]


def test_a_shard_is_there_whole_or_not_at_all(tmp_path, monkeypatch):
    monkeypatch.setattr("wanlite.data.os.replace", lambda *paths: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        write_numbered(tmp_path, (2,))
    assert not shard_path(tmp_path, 0).exists()


def test_the_order_is_a_function_of_seed_and_epoch_alone():
    whole = list(SeededBatches(100, 32, seed=3, first=0, last=9))
    resumed = list(SeededBatches(100, 32, seed=3, first=5, last=9))
    assert whole[5:] == resumed and whole != list(SeededBatches(100, 32, seed=4, first=0, last=9))


def test_an_epoch_deals_every_state_at_most_once_and_the_next_in_another_order():
    batches = list(SeededBatches(96, 32, seed=0, first=0, last=6))
    first, second = (sum(part, []) for part in (batches[:3], batches[3:]))
    assert sorted(first) == sorted(second) == list(range(96)) and first != second


def test_fewer_states_than_a_batch_are_refused():
    with pytest.raises(ValueError, match="raise --num_trajectories"):
        SeededBatches(10, 32, 0, 0, 1)


def test_a_cache_is_found_again_only_by_what_it_was_made_of(tmp_path):
    first = cache_folder(tmp_path, "trajectories", teacher="a", guidance=(4.0, 3.0))
    assert first == cache_folder(tmp_path, "trajectories", guidance=(4.0, 3.0), teacher="a")
    assert first != cache_folder(tmp_path, "trajectories", teacher="a", guidance=(4.0, 2.0))
