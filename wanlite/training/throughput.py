"""What a run does, in figures: images a second, where the time goes, memory, how much of the device's
arithmetic is used.

Nothing here waits for the device. On CUDA the teacher's time is that between pairs of events, which are read
once they are past.
"""

import time
from contextlib import contextmanager

import psutil
import torch

from ..network import pass_operations


class Pace:
    """Counts what happens from one restart() to the next.

    `rate` is the operations a second that the device multiplies matrices with, `ranks` the processes that do
    the same beside this one.
    """

    def __init__(self, device, rate, ranks=1):
        self.device, self.rate, self.ranks, self.resident = torch.device(device), rate, ranks, 0
        self.restart()

    def restart(self):
        """Count anew from here."""
        self.began, self.states, self.operations = time.perf_counter(), 0, 0
        self.asked, self.waited, self.taught, self.under_way = 0, 0.0, 0.0, []

    # ---- counting ------------------------------------------------------------------------------------------

    def deal(self, batches):
        """Yield `batches`, an iterator of (batch, TextTokens), and count the states in them and the time
        until they were there.
        """
        self.restart()
        while True:
            began = time.perf_counter()
            try:
                batch, text = next(batches)
            except StopIteration:
                return
            self.waited += time.perf_counter() - began
            self.states += len(text.tokens)
            yield batch, text

    def count(self, network):
        """Count the operations of every pass of a network from now on; one with a gradient is thrice a pass,
        there and back.
        """

        def counted(_, arguments, named, __):
            latents, _, text = arguments
            tokens = (
                latents.shape[-2]
                * latents.shape[-1]
                // (network.config.patch_size[1] * network.config.patch_size[2])
            )
            once = pass_operations(network.config, len(latents), tokens, text.shape[1])
            self.operations += once * (3 if torch.is_grad_enabled() else 1)

        network.register_forward_hook(counted, with_kwargs=True)

    def timed(self, velocity_for):
        """Return the same maker of velocity functions; the time in these is the teacher's."""

        def timed_for(*arguments):
            velocity_of = velocity_for(*arguments)

            def timed_velocity(latents, timestep):
                with self._teaching(len(latents)):
                    return velocity_of(latents, timestep)

            return timed_velocity

        return timed_for

    @contextmanager
    def _teaching(self, rows):
        self.asked += rows
        if self.device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            yield
            end.record()
            self.under_way.append((start, end))
        else:
            began = time.perf_counter()
            yield
            self.taught += time.perf_counter() - began

    # ---- reporting -----------------------------------------------------------------------------------------

    def figures(self):
        """Return what was counted, by name, and restart().

        Shares are of the time since the last restart; `memory_peak_gb` is the peak of allocated memory on
        a GPU, on the CPU the largest resident set; `model_flops_utilisation` is the share of the device's rate
        that the networks' operations make up, without those that checkpointing repeats.
        """
        seconds = max(time.perf_counter() - self.began, 1e-9)
        found = {
            "images_per_second": self.ranks * self.states / seconds,
            "teacher_share": self._taught() / seconds,
            "data_wait_share": self.waited / seconds,
            "memory_peak_gb": self._peak() / 1e9,
            "model_flops_utilisation": self.operations / (seconds * self.rate),
        }
        self.restart()
        return {name: float(f"{value:.4g}") for name, value in found.items()}

    def generation_figures(self, num_steps):
        """Return the speed of the teacher on trajectories of `num_steps`, and restart(); empty if it did not run."""
        seconds, generated, taught = (
            time.perf_counter() - self.began,
            self.ranks * self.asked / num_steps,
            self._taught(),
        )
        self.restart()
        return (
            {
                "generated": round(generated),
                "trajectories_per_second": round(generated / seconds, 4),
                "generation_teacher_share": round(taught / seconds, 4),
            }
            if generated
            else {}
        )

    def _taught(self):
        """Return the seconds in the teacher; on CUDA those of the calls that are over."""
        past = [pair for pair in self.under_way if pair[1].query()]
        return self.taught + sum(start.elapsed_time(end) for start, end in past) / 1000

    def _peak(self):
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        self.resident = max(self.resident, psutil.Process().memory_info().rss)
        return self.resident


def in_brief(figures):
    """Return figures as a progress bar shows them."""
    return {
        "images/s": f"{figures['images_per_second']:.3g}",
        "teacher": f"{figures['teacher_share']:.0%}",
        "waits": f"{figures['data_wait_share']:.0%}",
        "used": f"{figures['model_flops_utilisation']:.0%}",
    }
