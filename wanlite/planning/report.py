"""The memory and disk that a run needs -> the lines of the plan, and the problems with the setting to change."""

import math
from dataclasses import dataclass
from typing import Any

from ..runtime.terminal import labelled
from .disk import FolderSpace, format_size
from .hardware import fit_batch_size


@dataclass(frozen=True)
class MemoryReport:
    """The bytes that each phase needs on the device and each folder on disk, beside those that are free.

    `residencies` is {residency: bytes of the teacher on the device and in CPU memory}, empty if no trajectory
    is generated. Training on no states needs `base_bytes`.
    """

    settings: Any
    device: Any
    free_bytes: int
    base_bytes: int
    phases: dict[str, int]
    residencies: dict[str, tuple[int, int]]
    folders: dict[str, FolderSpace]

    def describe(self) -> list[str]:
        """Return the lines of the plan."""
        where = "on the GPU of --plan_for" if self.settings.plan_for else f"free on {self.device}"
        lines = [f"memory   {format_size(self.free_bytes)} {where}"]
        lines += [f"  {format_size(size):>10}  {phase}" for phase, size in self.phases.items()]
        if self.residencies:
            lines += self._describe_residencies().splitlines()
        return [*lines, "disk", *(_describe_folder(*item) for item in self.folders.items())]

    def _describe_residencies(self):
        chosen = self.settings.teacher_residency
        other_bytes = self.phases["trajectories"] - self.residencies[chosen][0]
        sizes = []
        for residency, (device_bytes, cpu_bytes) in self.residencies.items():
            on_cpu = f" (+ {format_size(cpu_bytes)} CPU)" if cpu_bytes else ""
            sizes.append(f"{residency} {format_size(other_bytes + device_bytes)}{on_cpu}")
        return labelled("experts", f"{chosen}; trajectories by --teacher_residency: {', '.join(sizes)}")

    def find_problems(self) -> list[str]:
        """Return a sentence for each phase and each disk that does not fit; it names the setting to change."""
        memory = [
            f"{problem}: {remedy}." for phase, problem, remedy in self._remedies() if not self._fits(phase)
        ]
        return memory if self.settings.plan_for else memory + self._find_disk_problems()

    def _fits(self, phase):
        return self.phases.get(phase, 0) <= self.free_bytes

    def _remedies(self):
        """Return (phase, problem, remedy) of each phase."""
        more_memory = "use a machine with more free memory"
        is_on_disk = self.settings.teacher_residency == "disk"
        remedies = [
            ("text", "the text encoder does not fit", more_memory),
            (
                "trajectories",
                "the teacher's passes do not fit",
                "lower --resolution" if is_on_disk else "add --teacher_residency disk",
            ),
            ("validation", "validation does not fit", "lower --validation_trajectories"),
            (
                "start",
                "the projection does not fit",
                f"{more_memory}; a projected student in --cache_dir is reused",
            ),
            ("decoder", "the training of the small decoder does not fit", "leave --decoder out"),
            (
                "text_velocity",
                "the training of the small text encoder does not fit",
                "leave --text_encoder out",
            ),
        ]
        if not self._fits("training"):  # matching needs more, and the same remedy
            return [*remedies, ("training", *self._reduce_batch())]
        matching_remedy = "leave --matching_steps out, or lower --train_batch_size"
        return [*remedies, ("matching", "distribution matching does not fit", matching_remedy)]

    def _reduce_batch(self):
        """Return the problem and the remedy of training that does not fit."""
        batch_size, accumulation = self.settings.train_batch_size, self.settings.gradient_accumulation_steps
        fitting = fit_batch_size(batch_size, self.phases["training"], self.base_bytes, self.free_bytes)
        if not fitting:
            problem = "training does not fit with any batch size"
            return problem, "add --gradient_checkpointing, or lower --resolution"
        remedy = f"lower --train_batch_size to {fitting} and raise --gradient_accumulation_steps to "
        return "training does not fit", f"{remedy}{accumulation * batch_size // fitting}"

    def _find_disk_problems(self):
        missing = {folder: space.missing_bytes for folder, space in self.folders.items()}
        if len({space.free_bytes for space in self.folders.values()}) == 1:  # they share one disk
            missing = {next(iter(missing)): sum(missing.values())}
        remedy = "Name another --cache_dir or --output_dir."
        if self.residencies:
            remedy = "Lower --num_trajectories, or name a larger --cache_dir."
        return [
            f"the disk is too small: {folder} needs {format_size(size, math.ceil)} more, and "
            f"{format_size(self.folders[folder].free_bytes, math.floor)} are free. {remedy}"
            for folder, size in missing.items()
            if size > self.folders[folder].free_bytes
        ]


def _describe_folder(folder, space):
    existing = f"{format_size(space.existing_bytes)} exist, " if space.existing_bytes else ""
    free = f"{format_size(space.free_bytes)} free"
    return f"  {format_size(space.needed_bytes):>10}  {folder} ({existing}{free})"
