"""Throughput of a run: images per second, shares of the time, peak memory, and utilisation of the device.

Nothing here synchronises with the device. On CUDA the teacher's time is measured between pairs of events, which
are read once they are complete.
"""

import time
from contextlib import contextmanager

import psutil
import torch

from ..network import pass_operations


class Pace:
    """Counts states, operations and seconds from one restart() to the next.

    `rate` is the device's speed at matrix products, in operations per second; `ranks` is the number of processes
    that do the same work.
    """

    def __init__(self, device, rate, ranks=1):
        self.device = torch.device(device)
        self.rate = rate
        self.ranks = ranks
        self.peak_resident = 0  # bytes
        self.restart()

    def restart(self):
        """Set all counts to zero."""
        self.began = time.perf_counter()
        self.states = 0
        self.operations = 0
        self.wait_seconds = 0.0
        self.teacher_states = 0
        self.teacher_seconds = 0.0
        self.teacher_events = []  # pairs of CUDA events around calls of the teacher

    # ---- counting ------------------------------------------------------------------------------------------

    def count_batches(self, batches):
        """Yield `batches`, an iterator of (batch, TextTokens); count their states and the time spent waiting."""
        self.restart()
        while True:
            began = time.perf_counter()
            try:
                batch, text = next(batches)
            except StopIteration:
                return
            self.wait_seconds += time.perf_counter() - began
            self.states += len(text.tokens)
            yield batch, text

    def count_operations(self, network):
        """Count the operations of every later pass of a network; with gradients, a pass counts three times."""

        def count_pass(_, arguments, named, __):
            latents, _, text = arguments
            _, height, width = network.config.patch_size
            tokens = latents.shape[-2] * latents.shape[-1] // (height * width)
            operations = pass_operations(network.config, len(latents), tokens, text.shape[1])
            self.operations += operations * (3 if torch.is_grad_enabled() else 1)

        network.register_forward_hook(count_pass, with_kwargs=True)

    def time_teacher(self, velocity_for):
        """Return `velocity_for`, a maker of the teacher's velocity functions, with these functions timed."""

        def timed_velocity_for(*arguments):
            velocity_of = velocity_for(*arguments)

            def timed_velocity(latents, timestep):
                with self._count_teacher(len(latents)):
                    return velocity_of(latents, timestep)

            return timed_velocity

        return timed_velocity_for

    @contextmanager
    def _count_teacher(self, num_states):
        self.teacher_states += num_states
        if self.device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            yield
            end.record()
            self.teacher_events.append((start, end))
        else:
            began = time.perf_counter()
            yield
            self.teacher_seconds += time.perf_counter() - began

    # ---- reporting -----------------------------------------------------------------------------------------

    def figures(self):
        """Return the figures since the last restart() by name, and restart.

        Shares are fractions of the elapsed time. `memory_peak_gb` is the peak of allocated memory on a GPU, and
        the largest resident set on the CPU. `model_flops_utilisation` is the fraction of the device's rate that
        the networks use; recomputation by gradient checkpointing is not counted.
        """
        seconds = max(time.perf_counter() - self.began, 1e-9)
        found = {
            "images_per_second": self.ranks * self.states / seconds,
            "teacher_share": self._sum_teacher_seconds() / seconds,
            "data_wait_share": self.wait_seconds / seconds,
            "memory_peak_gb": self._measure_peak() / 1e9,
            "model_flops_utilisation": self.operations / (seconds * self.rate),
        }
        self.restart()
        return {name: float(f"{value:.4g}") for name, value in found.items()}

    def generation_figures(self, num_steps):
        """Return the speed of generating trajectories of `num_steps`, and restart; {} if none was generated."""
        seconds = time.perf_counter() - self.began
        generated = self.ranks * self.teacher_states / num_steps
        teacher_seconds = self._sum_teacher_seconds()
        self.restart()
        if not generated:
            return {}
        return {
            "generated": round(generated),
            "trajectories_per_second": round(generated / seconds, 4),
            "generation_teacher_share": round(teacher_seconds / seconds, 4),
        }

    def _sum_teacher_seconds(self):
        """Return the seconds in the teacher; on CUDA, in the calls that are complete."""
        complete = [(start, end) for start, end in self.teacher_events if end.query()]
        return self.teacher_seconds + sum(start.elapsed_time(end) for start, end in complete) / 1000

    def _measure_peak(self):
        """Return the peak memory in bytes."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        self.peak_resident = max(self.peak_resident, psutil.Process().memory_info().rss)
        return self.peak_resident
