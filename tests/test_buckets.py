"""Aspect ratios: states of several sizes, batches of one size each, and unchanged runs without the flag."""

import math
from collections import Counter

import pytest
import torch
from accelerate import Accelerator

from tests.test_data import STEPS, student_for, teacher_for
from train_distillation import Settings
from wanlite.data.buckets import MAX_RATIO, bucket_sizes
from wanlite.data.datasets import Buckets, FewStepStates, SeededBatches
from wanlite.data.trajectories import TrajectoryGenerator, split_jobs
from wanlite.flow import FewSteps, make_scheduler
from wanlite.planning.resolve import complete


@pytest.mark.parametrize("unit", [16, 32])
@pytest.mark.parametrize("size", [(512, 512), (640, 384)])
def test_a_bucket_has_about_the_area_of_the_resolution_and_about_its_ratio(size, unit):
    ratios = {"1:1": 1, "3:2": 1.5, "2:3": 2 / 3, "16:9": 16 / 9}
    for ratio, (width, height) in zip(ratios.values(), bucket_sizes(size, list(ratios), unit), strict=True):
        assert width % unit == height % unit == 0
        assert width * height == pytest.approx(math.prod(size), rel=0.1) and width / height == pytest.approx(
            ratio, rel=0.1
        )


def test_without_ratios_there_is_one_bucket_and_equal_sizes_are_one():
    assert bucket_sizes((640, 384), None) == [(640, 384)]
    assert bucket_sizes((64, 64), ["1:1", "3:2", "16:9", "100:101"]) == [(64, 64), (80, 48)]


@pytest.mark.parametrize(
    "ratio", ["3", "3:0", "0:3", "3x2", "1.5:1", "-3:2", ":", "1:2:3", f"{MAX_RATIO + 1}:1", "1:99"]
)
def test_an_invalid_aspect_ratio_is_refused(ratio):
    with pytest.raises(
        ValueError, match=f"--aspect_ratios {ratio}: expected WIDTH:HEIGHT such as 3:2, from 1:4 to 4:1"
    ):
        complete(Settings(aspect_ratios=["1:1", ratio]))


def test_too_few_on_policy_states_for_the_buckets_are_refused():
    with pytest.raises(
        ValueError, match="--rollout_states is 2, expected 0, or at least one for each of the 3"
    ):
        complete(Settings(aspect_ratios=["1:1", "3:2", "2:3"], rollout_states=2))


def test_jobs_are_spread_evenly_by_seed_and_unchanged_with_one_bucket():
    jobs = [f"job {number}" for number in range(31)]
    dealt = split_jobs(jobs, 3, seed=5)
    assert sorted(map(len, dealt)) == [10, 10, 11] and sorted(sum(dealt, [])) == sorted(jobs)
    assert dealt == split_jobs(jobs, 3, seed=5) != split_jobs(jobs, 3, seed=6) and split_jobs(
        jobs, 1, seed=5
    ) == [jobs]
    assert split_jobs(jobs[:20], 3, seed=5) == [
        [job for job in own if job in jobs[:20]] for own in dealt
    ]  # more jobs only lengthen the lists
    with pytest.raises(ValueError, match="2 images of the teacher are fewer than the 3 sizes"):
        split_jobs(jobs[:2], 3, seed=5)


SIZES = [96, 70, 40]


def test_an_epoch_uses_all_buckets_in_mixed_order_with_one_bucket_per_batch():
    batches = list(SeededBatches(SIZES, 32, seed=0, first=0, last=6))  # 3 + 2 + 1
    starts = [0, 96, 166, 206]
    of = [
        [bucket for bucket in range(3) if starts[bucket] <= number < starts[bucket + 1]]
        for batch in batches
        for number in batch
    ]
    turns = [Counter(bucket for (bucket,) in of[first : first + 32]) for first in range(0, len(of), 32)]
    assert all(len(turn) == 1 for turn in turns) and sum(turns, Counter()) == {0: 96, 1: 64, 2: 32}
    assert len(set(sum(batches, []))) == 6 * 32 and [*map(next, map(iter, turns))] != [0, 0, 0, 1, 1, 2]


def test_the_order_of_buckets_is_a_function_of_seed_and_epoch_alone():
    whole = list(SeededBatches(SIZES, 32, seed=3, first=0, last=20))
    assert whole[7:] == list(SeededBatches(SIZES, 32, seed=3, first=7, last=20)) and whole[:6] != whole[6:12]


def test_a_single_bucket_has_the_order_of_states_without_buckets():
    generator = torch.Generator().manual_seed(3 * 1_000_003 + 1)
    order = torch.randperm(100, generator=generator).tolist()
    assert (
        list(SeededBatches([100], 32, 3, 3, 6))
        == list(SeededBatches(100, 32, 3, 3, 6))
        == [order[start : start + 32] for start in (0, 32, 64)]
    )


def test_a_bucket_of_less_than_a_batch_is_refused():
    with pytest.raises(ValueError, match="31 cached states .* name fewer --aspect_ratios"):
        SeededBatches([64, 31], 32, 0, 0, 1)


def test_a_few_step_batch_has_one_shape_and_the_states_of_its_indices(tmp_path):
    scheduler, few, data, shapes = (
        make_scheduler(3.0),
        make_scheduler(3.0, (1, 2)),
        [],
        [(2, 4, 4), (2, 2, 6)],
    )
    for bucket, shape in enumerate(shapes):
        jobs = [(number, f"{number}", 10 * bucket + number) for number in range(3 + bucket)]
        for part in ("trajectories", "on_policy"):
            (tmp_path / f"{part}{bucket}").mkdir()
        trajectory_generator = TrajectoryGenerator(
            Accelerator(), teacher_for, scheduler, STEPS, basis=torch.eye(4)
        )
        trajectories = trajectory_generator.generate(tmp_path / f"trajectories{bucket}", jobs, shape)
        on_policy = trajectory_generator.roll_out(
            tmp_path / f"on_policy{bucket}", [(*jobs[0], 2, 1)], shape, student_for, few
        )
        data.append(FewStepStates(trajectories, [(999.0, 0.999), (500.0, 0.5)], on_policy))
    buckets = Buckets(data)
    assert buckets.sizes == [7, 9] and len(buckets) == 16
    for numbers, bucket in (([6, 0, 3], 0), ([7, 15, 12], 1)):
        batch, alone = (
            buckets.__getitems__(numbers),
            data[bucket].__getitems__([number - 7 * bucket for number in numbers]),
        )
        assert batch["latents"].shape == (3, *shapes[bucket])
        assert all(torch.equal(tensor, alone[name]) for name, tensor in batch.items())


def test_few_steps_generate_in_the_shape_of_a_batch():
    few = FewSteps(3.0, (1, 2), (2, 4, 4), 20)
    generated = few.draw(
        3, lambda latents, timestep: latents, torch.Generator().manual_seed(0), "cpu", (2, 2, 6)
    )
    assert generated.shape == (3, 2, 2, 6)
