"""A teacher's weights -> the student's initial weights, which are projected and calibrated once and cached."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from ..files.atomic import find_corruption, new_folder, write_json
from ..files.cache import cache_folder, read_record, write_record
from ..files.json_files import OWN, read_json
from ..files.locks import in_turn
from ..network import pack_text
from ..teacher.checkpoint import open_teacher_files
from ..teacher.experts import check_experts
from .calibration import calibrate, choose_channels, make_frames
from .layout import weight_names
from .projection import Report, choose_experts, project
from .shape import DEFAULT_EXPERT, check_shape_fits

# Part of the cache key of initial weights. Raise it with every change of projection, pruning or calibration after
# which the same inputs give different weights, so that older caches are not used.
METHOD_VERSION = 1
REPORT = "report.json"  # of the projection, beside the initial weights


def project_into(
    student, folder, expert=DEFAULT_EXPERT, text_samples=None, channels=None, device="cpu"
) -> Report:
    """Project the weights of the teacher in `folder` into a student, in place.

    Raises OSError or ValueError before any tensor is projected if files are invalid, see open_teacher_files and
    check_experts, or if the student's shape does not fit this teacher.
    """
    files = open_teacher_files(folder)
    check_shape_fits(files.config, dict(student.config))
    chosen = choose_experts(files, expert)
    cosines = check_experts(files, device)
    report = project(student, chosen, text_samples, channels, device)
    report.cosines = cosines
    return report


def compare_experts(settings, files, device) -> dict[str, float]:
    """Return the cosines of check_experts(), which are cached because they require reading both experts."""
    record = Path(settings.cache_dir) / f"experts-{files.fingerprint[:16]}.json"
    if cosines := read_record(record):
        return cosines
    cosines = check_experts(files, device)
    record.parent.mkdir(parents=True, exist_ok=True)
    write_record(record, cosines)
    return cosines


def initialize_student(
    settings, student, files, prompt_embeddings, prompts, latent_size, accelerator
) -> dict[str, Any] | None:
    """Initialize the student as --projection and --student select.

    `prompts` are used for calibration. Initial weights are read from the cache if teacher, text encoder, shape,
    prompts, settings and METHOD_VERSION are the same. Returns the report for run.json, None if nothing is
    projected.
    """
    log = accelerator.print
    if settings.student is not None:
        log(f"start    {settings.student}, a saved student")
        saved = type(student).from_pretrained(settings.student, dtype="float32")
        student.load_state_dict(saved.state_dict())
        return None
    if settings.projection == "none":
        log("random start: nothing is projected (the control)")
        return None
    with accelerator.main_process_first():
        folder = initialization_folder(
            settings, student, files, prompt_embeddings.encoder_digest, prompts, latent_size
        )
    if accelerator.is_main_process:
        with in_turn(folder, log):
            if find_corruption(folder):
                embeddings = [prompt_embeddings[prompt] for prompt in prompts]
                report = _project_and_calibrate(
                    settings, student, files, embeddings, latent_size, accelerator.device
                )
                log("projected the teacher's weights into the student; run.json has the energy kept")
                _save_initialization(folder, settings, student, report, len(embeddings))
    accelerator.wait_for_everyone()
    student.load_state_dict(load_file(folder / weight_names()[0]), strict=True)
    return read_json(folder / REPORT, OWN)


def initialization_folder(
    settings, student, files, text_digest, prompts, latent_size, version: int = METHOD_VERSION
) -> Path:
    """Return the folder of initial weights in the cache; `text_digest` identifies the text encoder."""
    return cache_folder(
        settings.cache_dir,
        "start",
        teacher=files.fingerprint,
        text=text_digest,
        prompts=prompts,
        student={name: value for name, value in student.config.items() if name[0] != "_"},
        method=version,
        settings=(settings.projection, settings.expert, settings.seed, settings.flow_shift, latent_size),
    )


def _project_and_calibrate(settings, student, files, embeddings, latent_size, device) -> Report:
    """Project the teacher's weights into the student, and calibrate it on one frame per embedding."""
    experts, channels, frames = choose_experts(files, settings.expert), None, None
    if settings.projection == "calibrated":
        text, shift = pack_text(embeddings), settings.flow_shift
        frames = make_frames(experts[0], text, latent_size, seed=settings.seed, shift=shift, device=device)
        channels = choose_channels(experts[0], frames, student.config.hidden_size)
    report = project(student, experts, torch.cat(embeddings), channels, device)
    report.cosines = compare_experts(settings, files, device)
    if frames is not None:
        calibrate(student.to(device), experts[0], report, frames)
    return report


def _save_initialization(folder, settings, student, report, num_frames):
    calibrated = {"calibration_frames": num_frames if settings.projection == "calibrated" else 0}
    with new_folder(folder) as partial_folder:
        student.save_pretrained(partial_folder)
        write_json(partial_folder / REPORT, report.as_dict() | calibrated)
