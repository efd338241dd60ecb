"""Prefetched batches equal those read in the step, and the reading thread ends with the run."""

import json
import threading
import time

import pytest
import torch

from tests.test_resuming import folder, have_equal_weights, send_signal, train  # noqa: F401
from wanlite.data.prefetch import read_ahead
from wanlite.network import TextTokens


def read(job):
    return {"number": torch.tensor([job])}, TextTokens(torch.full((1, 1, 1), float(job)), torch.zeros(1, 1))


def readers():
    return [thread for thread in threading.enumerate() if thread.name.startswith("reading")]


@pytest.mark.parametrize("ahead", [0, 1, 2, 50])
def test_prefetched_batches_come_in_order_and_leave_no_thread(ahead):
    found = [
        (batch["number"].item(), text.tokens.item())
        for batch, text in read_ahead(read, range(20), "cpu", ahead)
    ]
    assert found == [(number, number) for number in range(20)] and not readers()


def test_the_next_batches_are_read_during_a_step():
    was_read = []
    coming = read_ahead(lambda job: was_read.append(job) or read(job), range(9), "cpu", 2)
    assert not was_read
    next(coming)
    until = time.monotonic() + 10
    while len(was_read) < 3 and time.monotonic() < until:
        time.sleep(0.001)
    assert was_read == [0, 1, 2] and len(readers()) == 1  # at most two batches ahead
    coming.close()
    assert not readers()


@pytest.mark.parametrize("ahead", [0, 2])
def test_an_unreadable_batch_is_an_error_at_its_own_step(ahead):
    def broken(job):
        if job == 3:
            raise OSError("shard-00003: not whole")
        return read(job)

    coming = read_ahead(broken, range(9), "cpu", ahead)
    assert [next(coming)[0]["number"].item() for _ in range(3)] == [0, 1, 2]
    with pytest.raises(OSError, match="not whole"):
        next(coming)
    assert not readers()


def test_a_run_with_prefetching_stops_and_resumes_to_the_same_weights(folder, finished_run):  # noqa: F811
    left = folder.with_name("left")

    def count_batches():
        left.write_text(json.dumps(len(readers())))

    code, printed = train(folder, at={1: count_batches, 2: send_signal()}, prefetched=2)
    assert code == 3 and "stopped at step 2 of 6" in printed and left.read_text() == "1"
    assert train(folder)[0] == 0 and have_equal_weights(folder, finished_run[0])
