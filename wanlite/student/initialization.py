"""A teacher's weights -> the student's initial weights, projected and calibrated once and kept in the cache."""

import json
from contextlib import suppress
from pathlib import Path

import torch
from safetensors.torch import load_file

from ..files.atomic import find_corruption, new_folder, write_json
from ..files.cache import cache_folder
from ..files.locks import in_turn
from ..network import pack_text
from ..teacher.checkpoint import open_teacher_files
from ..teacher.experts import check_experts
from .calibration import calibrate, choose_channels, make_frames
from .projection import choose_experts, project
from .shape import check_cut

# Part of the cache key of a projected start. Raise it with every change after which the same teacher, prompts
# and settings give other weights (in projection, pruning or calibration); older caches are then not used.
METHOD_VERSION = 1


def project_into(student, folder, expert="low", text_samples=None, channels=None, device="cpu"):
    """Fill a student with a teacher's weights, in place; returns the Report.

    Raises OSError and ValueError for files that no teacher can have, see open_teacher_files and
    check_experts, and for a shape that cannot be cut from this teacher, before any tensor is projected.
    """
    files = open_teacher_files(folder)
    check_cut(files.config, dict(student.config))
    chosen = choose_experts(files, expert)
    cosines = check_experts(files, device)
    report = project(student, chosen, text_samples, channels, device)
    report.cosines = cosines
    return report


def compare_experts(settings, files, device):
    """Return the cosines of check_experts(), which reads both experts once: they are kept in the cache,
    unless it refuses.
    """
    record = Path(settings.cache_dir) / f"experts-{files.fingerprint[:16]}.json"
    with suppress(OSError, ValueError, RecursionError):  # what is not there, or cannot be read, is made again
        if isinstance(cosines := json.loads(record.read_text(encoding="utf-8")), dict):
            return cosines
    cosines = check_experts(files, device)
    record.parent.mkdir(parents=True, exist_ok=True)
    write_json(record, cosines)
    return cosines


def start_student(settings, student, files, words, prompts, latent_size, accelerator):
    """Give the student its first weights, as --projection says; returns the report for run.json, None for a
    random start.

    `prompts` are those that it is calibrated on. A start that lies in the cache is taken as it is, if its
    teacher, text encoder, shape, prompts and method are the same.
    """
    say, device = accelerator.print, accelerator.device
    if settings.student is not None:
        say(f"start    {settings.student}, a saved student")
        student.load_state_dict(type(student).from_pretrained(settings.student, dtype="float32").state_dict())
        return None
    if settings.projection == "none":
        say("random start: nothing is projected (the control)")
        return None
    with accelerator.main_process_first():
        folder = start_folder(settings, student, files, words.said_by, prompts, latent_size)
    if accelerator.is_main_process:
        with in_turn(folder, say):
            if find_corruption(folder):
                make_start(
                    settings,
                    student,
                    files,
                    [words[prompt] for prompt in prompts],
                    latent_size,
                    folder,
                    device,
                    say,
                )
    accelerator.wait_for_everyone()
    say(f"start    {folder}")
    student.load_state_dict(load_file(folder / "diffusion_pytorch_model.safetensors"), strict=True)
    return json.loads((folder / "report.json").read_text())


def start_folder(settings, student, files, text, prompts, latent_size, version=METHOD_VERSION):
    """Return the folder of the cache for a start; `text` identifies the text encoder."""
    return cache_folder(
        settings.cache_dir,
        "start",
        teacher=files.fingerprint,
        text=text,
        prompts=prompts,
        student={name: value for name, value in student.config.items() if name[0] != "_"},
        method=version,
        settings=(settings.projection, settings.expert, settings.seed, settings.flow_shift, latent_size),
    )


def make_start(settings, student, files, embeddings, latent_size, folder, device, say):
    """Project the teacher's weights into the student, refit them where asked, and keep both student and
    report in `folder`.
    """
    experts, channels, is_calibrated = (
        choose_experts(files, settings.expert),
        None,
        settings.projection == "calibrated",
    )
    if is_calibrated:
        frames = make_frames(
            experts[0], pack_text(embeddings), latent_size, None, settings.seed, settings.flow_shift, device
        )
        channels = choose_channels(experts[0], frames, student.config.hidden_size)
    report = project(student, experts, torch.cat(embeddings), channels, device)
    report.cosines = compare_experts(settings, files, device)
    if is_calibrated:
        calibrate(student.to(device), experts[0], report, frames)
    say(f"{report}{f'; calibrated on {len(embeddings)} frames' if is_calibrated else ''}")
    with new_folder(folder) as partial_folder:
        student.save_pretrained(partial_folder)
        write_json(
            partial_folder / "report.json",
            report.as_dict() | {"calibration_frames": is_calibrated * len(embeddings)},
        )
