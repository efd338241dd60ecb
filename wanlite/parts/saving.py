"""A student with small parts -> a folder like that of a run; files that do not change are hard links."""

import shutil
from pathlib import Path
from typing import Any

import torch

from ..files.atomic import write_json
from ..files.file_names import COMPONENTS, MODEL_CARD, MODEL_INDEX, RUN
from ..student.digest import model_digest
from ..training.run_folder import copy_files, link_file, save_components
from .making import Pipeline, count_parameters

SAVED = ("", *COMPONENTS)  # what inference reads


def save_small(
    folder: Path,
    source: str | Path,
    small: Pipeline,
    record: dict[str, Any],
    figures: dict[str, Any],
    options: dict[str, Any],
) -> None:
    """Save the student, its parts and run.json; parts in bfloat16. `record` is the run.json of `source`."""
    source, staged = Path(source), folder / ".components"
    shutil.rmtree(staged, ignore_errors=True)  # of a save that was killed
    for component in COMPONENTS:
        copy_files(source / component, staged / component, link_file)
    link_file(source / MODEL_INDEX, staged / MODEL_INDEX)  # the class of the tokenizer
    if options["decoder_base_dim"] is not None:
        _replace(staged / "vae", small.autoencoder)
    if options["text_shape"] is not None:
        _replace(staged / "text_encoder", small.encoder)
    if "vocabulary" in figures:
        shutil.rmtree(staged / "tokenizer")
        small.tokenizer.save_pretrained(staged / "tokenizer")
    small.student.save_pretrained(folder)
    save_components(folder, staged, small.scheduler, link_file)
    shutil.rmtree(staged)
    for part, component in (("text_encoder", "text_encoder"), ("decoder", "vae")):
        if part in figures:
            sizes = [round(count_bytes(each, component) / 1e6, 3) for each in (folder, source)]
            figures[part] |= dict(zip(("megabytes", "large_megabytes"), sizes))
    _write_card(folder, source, small, figures)
    parts = {"student_sha256": record.get("model_sha256"), "options": options, "figures": figures}
    student = record["student"] | {"text_dim": small.student.config.text_dim}
    changed = {"student": student, "parts": parts, "model_sha256": model_digest(folder)}
    write_json(folder / RUN, record | changed)  # last: it marks a finished folder


def count_bytes(folder: Path, component: str) -> int:
    """Return the bytes of a component's files that inference reads, "" for the student itself."""
    pattern = "*" if component == "tokenizer" else "*.safetensors"
    return sum(path.stat().st_size for path in (folder / component).glob(pattern))


def _replace(folder, component):
    """Save a component in bfloat16 in place of another; the network in memory keeps its dtype."""
    shutil.rmtree(folder)
    dtype = component.dtype
    # The method of diffusers would warn of its list of layers in float32, which is empty here.
    torch.nn.Module.to(component, torch.bfloat16).save_pretrained(folder)
    torch.nn.Module.to(component, dtype)


def _write_card(folder, source, small, figures):
    """Write README.md: that of the student, with the sizes and figures of its parts."""
    card = source / MODEL_CARD
    text = card.read_text(encoding="utf-8") if card.is_file() else ""
    text = text.replace(str(source), str(folder))
    rows = ["| part | parameters | of the large one | MB | of | likeness to it |", f"|{'---|' * 6}"]
    for name, part, measure in (
        ("text encoder", figures.get("text_encoder"), "cosine {cosine:.3f}"),
        ("decoder", figures.get("decoder"), "{psnr:.1f} dB"),
    ):
        if part:
            share = part["parameters"] / part["large_parameters"]
            sizes = f"{part['megabytes']:,.1f} | {part['large_megabytes']:,.1f}"
            rows.append(
                f"| {name} | {part['parameters']:,} | {share:.0%} | {sizes} | {measure.format(**part)} |"
            )
    accuracy = figures["accuracy"]
    judged = (
        f"\n\nHeld-out captions drawn right: {accuracy['small']:.1%}, {accuracy['large']:.1%} with the large parts."
        if accuracy
        else ""
    )
    if vocabulary := figures.get("vocabulary"):
        judged += f"\n\nThe tokenizer has {vocabulary['scripts']}. Other words may be missing in images."
    title = f"## Small parts\n\nThe student itself has {count_parameters(small.student):,} parameters."
    table = "\n".join(rows)
    (folder / MODEL_CARD).write_text(f"{text}\n{title}\n\n{table}{judged}\n", encoding="utf-8")
