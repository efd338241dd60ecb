"""A bounded queue in front of one student: images that wait are drawn in batches of one size and step count.

One thread draws. A batch takes the images of the oldest one's shape, so none waits for ever.
"""

import asyncio
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple

from .requests import Job

SMOOTHING = 0.2  # of the seconds that an image takes, from one batch to the next


class QueueFull(Exception):
    """The queue has no room; `retry_after` are the seconds until it likely has."""

    def __init__(self, waiting: int, retry_after: int):
        super().__init__(f"{waiting} images are waiting; try again in {retry_after} s.")
        self.retry_after = retry_after


class QueueClosed(Exception):
    """The queue takes no images any more."""


class Waiting(NamedTuple):
    job: Job
    future: Future


class DrawingQueue:
    """Draws jobs in a thread of its own; `draw` returns a result for each job of a batch.

    `batch_size` returns the largest batch for a job. At most `max_waiting` images wait; those being drawn do not
    count.
    """

    def __init__(
        self, draw: Callable[[list[Job]], Sequence[Any]], batch_size: Callable[[Job], int], max_waiting: int
    ):
        self.draw_batch, self.batch_size, self.max_waiting = draw, batch_size, max_waiting
        self.is_drawing = False
        self.num_drawn = 0
        self.seconds_per_image = 0.0
        self._waiting: deque[Waiting] = deque()
        self._is_closed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="drawing", daemon=True)
        self._thread.start()

    def __len__(self) -> int:
        with self._changed:
            self._drop_cancelled()
            return len(self._waiting)

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive() and not self._is_closed

    def submit(self, jobs: Sequence[Job]) -> list[Future]:
        """Queue images together; raises QueueFull, or QueueClosed. A cancelled future is drawn if it has begun."""
        with self._changed:
            if self._is_closed:
                raise QueueClosed("the server is stopping.")
            self._drop_cancelled()
            if len(self._waiting) + len(jobs) > self.max_waiting:
                raise QueueFull(len(self._waiting), self._retry_after())
            added = [Waiting(job, Future()) for job in jobs]
            self._waiting += added
            self._changed.notify()
        return [each.future for each in added]

    async def draw(self, jobs: Sequence[Job]) -> list[Any]:
        """Return the results of jobs; if the caller is cancelled, the images that have not begun are dropped."""
        futures = [asyncio.wrap_future(future) for future in self.submit(jobs)]
        results = await asyncio.gather(*futures, return_exceptions=True)
        for result in results:
            if isinstance(result, BaseException):
                raise result
        return results

    def close(self) -> None:
        """Refuse all further and all waiting images; the batch that is being drawn is finished."""
        with self._changed:
            self._is_closed = True
            waiting, self._waiting = self._waiting, deque()
            self._changed.notify()
        for each in waiting:
            if each.future.set_running_or_notify_cancel():
                each.future.set_exception(QueueClosed("the server is stopping."))

    def _drop_cancelled(self) -> None:
        self._waiting = deque(each for each in self._waiting if not each.future.cancelled())

    def _retry_after(self) -> int:
        return max(1, min(3600, math.ceil(self.seconds_per_image * len(self._waiting))))

    def _run(self) -> None:
        while (batch := self._next_batch()) is not None:
            if batch:
                self._draw(batch)
                batch.clear()  # results live as long as their requests
            self.is_drawing = False

    def _next_batch(self) -> list[Waiting] | None:
        """Wait for images and remove a batch of them from the queue; None when the queue is closed."""
        with self._changed:
            while True:
                self._drop_cancelled()
                if self._waiting or self._is_closed:
                    break
                self._changed.wait()
            if not self._waiting:
                return None
            first = self._waiting[0].job
            most = max(1, self.batch_size(first))
            matching = [each for each in self._waiting if each.job.shape == first.shape][:most]
            taken = set(map(id, matching))
            self._waiting = deque(each for each in self._waiting if id(each) not in taken)
            self.is_drawing = True
            return [each for each in matching if each.future.set_running_or_notify_cancel()]

    def _draw(self, batch: list[Waiting]) -> None:
        start = time.monotonic()
        try:
            results = self.draw_batch([each.job for each in batch])
        except Exception as error:  # of any kind: the next batch is drawn
            for each in batch:
                each.future.set_exception(error)
            return
        self.num_drawn += len(batch)
        seconds = (time.monotonic() - start) / len(batch)
        self.seconds_per_image += (SMOOTHING if self.seconds_per_image else 1) * (
            seconds - self.seconds_per_image
        )
        for each, result in zip(batch, results, strict=True):
            each.future.set_result(result)
