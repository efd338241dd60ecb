"""Trajectories on disk and the order of batches."""

import json
import os
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file

from wanlite.data import shards as data
from wanlite.data.datasets import FewStepStates, SeededBatches, Trajectories
from wanlite.data.shards import (
    SCALE,
    dequantize,
    fill_shards,
    find_fault,
    quantize,
    read_shard,
    shard_path,
    write_shard,
)
from wanlite.data.text_encoder import encode_once
from wanlite.data.trajectories import (
    FEATURE_TOKENS,
    MAX_SAMPLED,
    TrajectoryGenerator,
    count_compared,
    sample_rows,
    sample_tokens,
)
from wanlite.files.cache import cache_folder
from wanlite.flow import clean_from, make_scheduler, sample, seeded_noise


def write_numbered(folder, sizes, states=3):
    """Write shards in which every value is the index of its state; returns their paths."""
    first = 0
    paths = [shard_path(folder, index) for index in range(len(sizes))]
    for path, size in zip(paths, sizes):
        number = torch.arange(first, first + size * states, dtype=torch.float32).view(size, states)
        write_shard(
            path,
            {
                "timestep": number,
                "latents": number[..., None].half(),
                "prompt": torch.arange(first, first + size * states, states) // states,
            },
        )
        first += size * states
    return paths


def test_concurrent_writers_of_one_shard_each_find_it_complete(tmp_path, monkeypatch):
    tensors, others, own = {"latents": torch.arange(4.0)}, [], shard_path(tmp_path)

    def save_while_another_does(found, path, metadata):
        if not others:
            others.append(path)
            write_shard(own, tensors)
        save_file(found, path, metadata)
        others.append(path)

    monkeypatch.setattr(data, "save_file", save_while_another_does)
    write_shard(own, tensors)
    assert len(set(others)) == 2 and torch.equal(read_shard(own)["latents"], tensors["latents"])
    assert list(tmp_path.iterdir()) == [own]


def test_partial_files_of_a_killed_run_are_deleted_after_an_hour(tmp_path):
    for name, age in (("old", 3700), ("new", 10)):
        (tmp_path / f".shard-00000-{name}.partial").write_text("half")
        os.utime(tmp_path / f".shard-00000-{name}.partial", (time.time() - age,) * 2)
    encode_once(
        Accelerator(cpu=True),
        lambda prompts: {"text": torch.ones(2, 3), "length": torch.tensor([2])},
        ["a"],
        tmp_path,
    )
    assert {path.name for path in tmp_path.iterdir()} == {
        ".shard-00000-new.partial",
        shard_path(tmp_path, 0, [("a",)]).name,
    }


JOBS = [(number, f"prompt {number}", 100 + number) for number in range(70)]


PATHS = [shard_path(Path(), index, JOBS[64 * index : 64 * index + 64]) for index in range(2)]


def fill(folder, jobs=JOBS, **options):
    """Fill the shards of `jobs`; returns the numbers of the prompts that were computed."""
    computed = []

    def make(numbers, prompts, seeds):
        computed.extend(numbers)
        latents = torch.stack([torch.full((2, 3, 4, 4), float(seed)) for seed in seeds])
        return {"latents": latents, "prompt": torch.tensor(numbers), "timestep": torch.ones(len(seeds), 2)}

    fill_shards(Accelerator(cpu=True), folder, jobs, make, "test", **options)
    return computed


def flip_bit(path, position, bit=0):
    content = bytearray(path.read_bytes())
    content[position] ^= 1 << bit
    path.write_bytes(content)


@pytest.mark.parametrize("seed", range(30))
def test_a_flipped_bit_of_a_shard_changes_nothing_or_is_computed_again(seed, tmp_path):
    fill(tmp_path)
    expected, path = [read_shard(tmp_path / each) for each in PATHS], tmp_path / PATHS[1]
    expected = [{name: tensor.clone() for name, tensor in shard.items()} for shard in expected]
    draw = np.random.default_rng(seed)
    limit = 8 if seed < 5 else 600 if seed < 15 else path.stat().st_size  # length, header, tensors
    flip_bit(path, int(draw.integers(limit)), int(draw.integers(8)))
    assert fill(tmp_path) in ([], list(range(64, 70)))
    for each, shard in zip(PATHS, expected):
        found = read_shard(tmp_path / each)
        assert found.keys() == shard.keys() and all(torch.equal(found[name], shard[name]) for name in shard)
    assert fill(tmp_path) == []


def rewrite(path, change, metadata=None):
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata)


DAMAGE = {
    "cut": (lambda path: os.truncate(path, 1000), "cannot be read"),
    "empty": (lambda path: os.truncate(path, 0), "cannot be read"),
    "pipe": (lambda path: (path.unlink(), os.mkfifo(path)), "not a regular file"),
    "device": (lambda path: (path.unlink(), path.symlink_to("/dev/zero")), "not a regular file"),
    "zeros": (lambda path: (os.truncate(path, 0), os.truncate(path, 3 * 10**9)), "cannot be read"),
    "without a digest": (lambda path: rewrite(path, lambda tensors: None), "differs from its sha256"),
    "another shard": (
        lambda path: path.write_bytes((path.parent / PATHS[0]).read_bytes()),
        "is of other prompts",
    ),
    "too few rows": (
        lambda path: write_shard(path, {"prompt": torch.arange(64, 69)}, JOBS[64:]),
        "has 5 rows",
    ),
    "other prompts": (
        lambda path: write_shard(path, {"prompt": torch.arange(6)}, JOBS[64:]),
        "other numbers",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_shard_is_named_and_computed_again(name, tmp_path, capsys):
    damage, words = DAMAGE[name]
    fill(tmp_path)
    path = tmp_path / PATHS[1]
    damage(path)
    began = time.process_time()
    assert words in find_fault(path, JOBS[64:]) and time.process_time() - began < 1
    assert fill(tmp_path) == list(range(64, 70))
    assert path.name in capsys.readouterr().out
    assert find_fault(path, JOBS[64:]) is None


@pytest.mark.parametrize("damage", (Path.unlink, lambda path: flip_bit(path, 2000)))
def test_a_damaged_shard_that_cannot_be_computed_again_is_refused(damage, tmp_path):
    fill(tmp_path)
    damage(tmp_path / PATHS[0])
    left = [path.stat().st_mtime_ns for path in tmp_path.iterdir()]
    with pytest.raises(OSError, match=f"{PATHS[0]}: the rollout of step 4 .*Put it back"):
        fill(tmp_path, irreplaceable="the rollout of step 4")
    assert left == [path.stat().st_mtime_ns for path in tmp_path.iterdir()]


def test_a_shard_is_hashed_once_in_a_start(tmp_path, monkeypatch):
    fill(tmp_path)
    hashed, find = [], data.find_fault
    monkeypatch.setattr(data, "find_fault", lambda *place: hashed.append(place[0]) or find(*place))
    fill(tmp_path)
    Trajectories([tmp_path / each for each in PATHS]).__getitems__([0, 130])
    assert sorted(hashed) == [tmp_path / each for each in PATHS]


def test_a_longer_list_of_jobs_reuses_the_shards_that_are_complete(tmp_path):
    more = [(number, f"prompt {number}", 100 + number) for number in range(130)]
    assert len(fill(tmp_path)) == 70
    assert fill(tmp_path, more) == list(range(64, 130))
    assert fill(tmp_path) == fill(tmp_path, more) == fill(tmp_path, more[:64]) == []


def test_a_batch_is_the_named_states_in_the_named_order(tmp_path):
    states = Trajectories(write_numbered(tmp_path, (4, 2, 5)))
    numbers = [32, 0, 13, 12, 11, 17, 18, 0]
    batch = states.__getitems__(numbers)
    assert len(states) == 33 and batch["timestep"].tolist() == numbers
    assert batch["latents"].flatten().tolist() == numbers and batch["prompt"].tolist() == [
        number // 3 for number in numbers
    ]


@pytest.mark.parametrize(
    "change",
    [
        lambda path: os.truncate(path, 100),
        lambda path: path.write_bytes(b""),
        lambda path: path.open("ab").write(b"more"),
        lambda path: flip_bit(path, -1),
    ],
)
def test_a_shard_that_changes_while_a_run_reads_it_is_refused_and_never_fatal(change, tmp_path):
    paths = write_numbered(tmp_path, (4, 2))
    states = Trajectories(paths)
    assert len(states.__getitems__([0, 13])["latents"]) == 2
    os.utime(paths[1], (0, 0))  # a clock may be too coarse to notice a file that is as long as before
    states = Trajectories(paths)
    change(paths[1])
    states.__getitems__([0])
    with pytest.raises(OSError, match=f"{paths[1].name}: was changed while the run reads it"):
        states.__getitems__([0, 13])


@pytest.mark.parametrize("change", [Path.unlink, lambda path: os.replace(path.with_name("other"), path)])
def test_a_shard_that_is_deleted_or_replaced_remains_as_it_was_for_its_readers(change, tmp_path):
    paths = write_numbered(tmp_path, (4,))
    states = Trajectories(paths)
    (tmp_path / "other").write_bytes(b"shorter")
    change(paths[0])
    assert states.__getitems__([11])["latents"].flatten().tolist() == [11]


def test_writing_a_shard_is_atomic(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "wanlite.data.shards.os.replace", lambda *paths: (_ for _ in ()).throw(KeyboardInterrupt)
    )
    with pytest.raises(KeyboardInterrupt):
        write_numbered(tmp_path, (2,))
    assert not shard_path(tmp_path).exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_not_stored(value, tmp_path):
    tensors = {"latents": torch.zeros(4, 8).half(), "velocity": torch.zeros(4, 8).half()}
    tensors["velocity"][2, 3] = value
    with pytest.raises(
        FloatingPointError, match="velocity has NaN or infinity and is not stored. Lower --guidance_scale"
    ):
        write_shard(shard_path(tmp_path), tensors)
    assert not list(tmp_path.iterdir())


def test_the_order_is_a_function_of_seed_and_epoch_alone():
    whole = list(SeededBatches(100, 32, seed=3, first=0, last=9))
    resumed = list(SeededBatches(100, 32, seed=3, first=5, last=9))
    assert whole[5:] == resumed and whole != list(SeededBatches(100, 32, seed=4, first=0, last=9))


def test_an_epoch_uses_each_state_at_most_once_in_an_order_of_its_own():
    batches = list(SeededBatches(96, 32, seed=0, first=0, last=6))
    first, second = (sum(part, []) for part in (batches[:3], batches[3:]))
    assert sorted(first) == sorted(second) == list(range(96)) and first != second


def test_fewer_states_than_a_batch_are_refused():
    with pytest.raises(ValueError, match="raise --num_trajectories"):
        SeededBatches(10, 32, 0, 0, 1)


def test_a_cache_is_found_only_by_its_provenance(tmp_path):
    first = cache_folder(tmp_path, "trajectories", teacher="a", guidance=(4.0, 3.0))
    assert first == cache_folder(tmp_path, "trajectories", guidance=(4.0, 3.0), teacher="a")
    assert first != cache_folder(tmp_path, "trajectories", teacher="a", guidance=(4.0, 2.0))


def test_a_cache_renamed_to_another_key_is_refused_with_the_differences(tmp_path):
    first = cache_folder(
        tmp_path, "trajectories", teacher="a", guidance=(4.0, 3.0), shift=3.0, text_length=512
    )
    second = cache_folder(
        tmp_path, "trajectories", teacher="a", guidance=(5.0, 3.0), shift=3.0, text_length=256
    )
    (second / "provenance.json").unlink()
    second.rmdir()
    first.rename(second)
    with pytest.raises(
        ValueError,
        match=r"guidance was \[4.0, 3.0\], is \[5.0, 3.0\]; text_length was 512, is 256.*Delete it",
    ):
        cache_folder(tmp_path, "trajectories", teacher="a", guidance=(5.0, 3.0), shift=3.0, text_length=256)
    (second / "provenance.json").write_text(json.dumps([]))
    with pytest.raises(ValueError, match="cannot be read"):
        cache_folder(tmp_path, "trajectories", teacher="a", guidance=(5.0, 3.0), shift=3.0, text_length=256)


def test_the_rows_used_to_compute_a_basis_are_bounded():
    states = torch.randn(4, 5000, 6)
    kept = [sample_rows(states, 10) for _ in range(10)]
    assert 0.5 * MAX_SAMPLED < sum(map(len, kept)) <= MAX_SAMPLED + len(kept)
    whole = sample_rows(states, 1)
    assert torch.equal(whole, states.flatten(0, 1))
    assert whole.untyped_storage().nbytes() == whole.nbytes and whole.data_ptr() != states.data_ptr()


def test_a_cache_of_an_older_layout_is_refused_by_its_name(tmp_path):
    folder = cache_folder(tmp_path, "trajectories", seed=1)
    provenance = json.loads((folder / "provenance.json").read_text())
    (folder / "provenance.json").write_text(json.dumps({"seed": provenance["seed"]}))
    with pytest.raises(ValueError, match=f"{folder.name}: .*layout was null.* Delete it"):
        cache_folder(tmp_path, "trajectories", seed=1)


def test_int8_keeps_a_state_to_a_hundredth_of_its_deviation_and_a_constant_exactly():
    states = torch.randn(2, 3, 16, 64, 64) * torch.tensor([1e-3, 1.0, 1e3]).view(3, 1, 1, 1)
    stored, scale = quantize(states)
    shard = {"latents": stored, "latents" + SCALE: scale}
    error = dequantize(shard, "latents", slice(None)) - states
    assert stored.dtype == torch.int8 and scale.shape == (2, 3, 16, 1, 1)
    assert (error.std((-3, -2, -1)) < 0.012 * states.std((-3, -2, -1))).all()
    for constant in (0.0, 1.0, -3e4):
        stored, scale = quantize(torch.full((1, 1, 2, 4), constant))
        torch.testing.assert_close(stored * scale, torch.full((1, 1, 2, 4), constant))


@pytest.mark.parametrize("odd", (float("nan"), float("inf")))
def test_a_value_that_is_not_finite_is_refused_in_int8_too(tmp_path, odd):
    states = torch.zeros(1, 1, 2, 4)
    states[0, 0, 1, 2] = odd
    stored, scale = quantize(states)
    with pytest.raises(FloatingPointError, match="latents"):
        write_shard(shard_path(tmp_path), {"latents": stored, "latents" + SCALE: scale})


@pytest.mark.parametrize("num_tokens", (1, 16, 256, 960, 1024, 4096))
def test_consecutive_states_compare_all_tokens_and_each_about_as_many(num_tokens):
    tokens = torch.arange(num_tokens).view(1, -1, 1)
    spacing = -(-num_tokens // count_compared(num_tokens))
    chosen = [sample_tokens(tokens, torch.tensor([first])).flatten().tolist() for first in range(spacing)]
    assert {len(set(each)) for each in chosen} == {count_compared(num_tokens)}
    assert set().union(*chosen) == set(range(num_tokens))
    assert count_compared(num_tokens) <= 2 * FEATURE_TOKENS


def test_hidden_states_are_stored_in_the_basis_to_one_percent(tmp_path):
    hidden_states = torch.randn(1, 9, 6).bfloat16()
    generator = TrajectoryGenerator(
        Accelerator(),
        lambda prompts, has_features: lambda latents, timestep: (latents, hidden_states),
        make_scheduler(3.0),
        2,
        basis=torch.eye(6)[:, :2],
    )
    kept = generator.generate(tmp_path, [(0, "a", 1)], (2, 4, 4)).__getitems__([0, 1])["features"]
    expected = hidden_states.float()[..., :2].expand(2, 9, 2)
    largest = expected.abs().amax(-1, keepdim=True)
    assert ((kept - expected).abs() <= 0.005 * largest).all()


def test_a_basis_has_the_directions_of_most_variance_and_is_cached(tmp_path):
    deviations, encoded = torch.tensor([0.1, 3.0, 0.2, 1.0]), []

    def velocity_for(prompts, has_features):
        encoded.append(prompts)

        def velocity_of(latents, timestep):
            return latents, 5 + deviations * torch.randn(len(latents), 50, 4)  # the mean is not a direction

        return velocity_of

    for _ in range(2):
        generator = TrajectoryGenerator(Accelerator(), velocity_for, make_scheduler(3.0), STEPS)
        generator.find_basis(tmp_path, ["a", "b"], SHAPE, 2)
        assert (
            generator.basis.shape == (4, 2) and generator.basis[[1, 3]].norm() > 0.99 * generator.basis.norm()
        )
    assert encoded == [["a", "b"]]


# ---- few-step states ---------------------------------------------------------------------------------------

SHAPE, STEPS = (2, 4, 4), 8


@pytest.fixture(scope="module")
def few_step_data(tmp_path_factory):
    """Trajectories of a teacher whose curved paths lead every noise to an image of its prompt; and
    on-policy states of a student.
    """
    folder, own = tmp_path_factory.mktemp("trajectories"), tmp_path_factory.mktemp("on_policy")
    jobs = [(number % 3, f"{number % 3}", 100 + number) for number in range(70)]
    scheduler, few = make_scheduler(3.0), make_scheduler(3.0, (1, 2, 4))
    generator = TrajectoryGenerator(Accelerator(), teacher_for, scheduler, STEPS, basis=torch.eye(4))
    states = generator.generate(folder, jobs, SHAPE)
    paths = [(*job, *((2, 1), (4, 3))[number % 2]) for number, job in enumerate(jobs[:20])]
    path = generator.roll_out(own, paths, SHAPE, student_for, few)
    return states, path, paths, few, scheduler


def teacher_for(prompts, has_features):
    aim = torch.tensor([float(prompt) for prompt in prompts]).view(-1, 1, 1, 1)

    def velocity_of(latents, timestep):
        velocity = (latents - aim) * (0.5 + timestep / 1000).view(-1, 1, 1, 1)
        return (velocity, torch.zeros(len(latents), 1, 4)) if has_features else velocity

    return velocity_of


def student_for(prompts):
    return lambda latents, timestep: 0.3 * latents


def test_every_few_step_target_leads_to_the_end_of_the_teachers_trajectory(few_step_data):
    states, path, *_ = few_step_data
    levels = [(999.0, 0.999), (900.0, 0.9), (500.0, 0.5)]
    few_step = FewStepStates(states, levels, path)
    assert len(few_step) == 70 + 70 + 20
    batch = few_step.__getitems__(range(140))
    seen = clean_from(batch["latents"], batch["velocity"].float(), batch["noise_level"])
    noise, images, prompts = states.ends(range(70))
    assert torch.allclose(seen, images.repeat(2, 1, 1, 1), atol=0.02) and torch.equal(
        batch["prompt"], prompts.repeat(2)
    )
    assert torch.allclose(batch["latents"][:70], noise, atol=0.02)
    assert set(batch["timestep"][:70].tolist()) == {999.0} and set(batch["timestep"][70:].tolist()) == {
        900.0,
        500.0,
    }


def test_on_policy_states_are_the_students_with_the_targets_of_the_teacher(few_step_data):
    states, path, paths, few, scheduler = few_step_data
    batch = FewStepStates(states, [(999.0, 0.999)], path).__getitems__(range(70, 90))
    for row, (number, prompt, seed, count, index) in enumerate(paths):
        met = sample(student_for([prompt]), seeded_noise(SHAPE, [seed]), few, count, end=index)
        image = sample(teacher_for([prompt], []), met, scheduler, STEPS, begin=STEPS * index // count)
        found = {name: part[row : row + 1].float() for name, part in batch.items()}
        assert torch.allclose(found["latents"], met, atol=0.02) and found["prompt"] == number
        assert torch.allclose(
            clean_from(found["latents"], found["velocity"], found["noise_level"]), image, atol=0.03
        )
        few.set_timesteps(count)
        assert found["timestep"] == few.timesteps[index] and found["noise_level"] == few.sigmas[index]


def test_states_at_noise_are_the_first_rows_and_marked_in_steps_of_eight(few_step_data):
    states, path, *_ = few_step_data
    few_step = FewStepStates(states, [(999.0, 0.999), (500.0, 0.5)], path)
    for num_noise, num_marked in ((0, 8), (3, 8), (8, 8), (9, 16), (40, 40)):
        numbers = [*range(145, 150), *range(100, 130), *range(num_noise)]
        batch = few_step.__getitems__(numbers)
        assert len(batch["is_noise"]) == num_marked and len(batch["latents"]) == len(numbers)
        assert int(batch["is_noise"].sum()) == num_noise
        assert torch.equal(batch["timestep"] == 999.0, torch.arange(len(numbers)) < num_noise)
        shares = [few_step.in_order(numbers)[rank::2] for rank in range(2)]
        assert all(few_step.in_order(share) == share for share in shares)


def test_a_one_step_student_has_only_noise_as_on_policy_states(few_step_data):
    assert len(FewStepStates(few_step_data[0], [(999.0, 0.999)])) == 70
