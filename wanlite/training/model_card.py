"""A run and its results -> README.md of the saved student, the model card of the hub. No torch."""

from pathlib import Path
from typing import Any

from ..files.file_names import MODEL_CARD, SAMPLES
from ..phases import MIN_CAPTIONS
from .run_folder import image_size

FIGURES = {  # of results, by the heading of their column
    "image error": "image_error",
    "diversity": "diversity",
    "colour drift": "channel_drift",
}
EXPLANATION = (
    "Image error is the squared distance from the teacher's image of the same noise, over the variance of the "
    "teacher's images; diversity and colour are compared with the teacher's, whose own are 1.00 and 0.00."
)


def write_model_card(
    folder: str | Path, settings: Any, few_steps: list[int], results: dict[str, Any], command: str
) -> None:
    """Write README.md: the model, its use with the `command` or with diffusers, and its results."""
    folder = Path(folder)
    parts = [
        _metadata(settings),
        "# A WanLiteStudent",
        _describe(settings, few_steps),
        _show_samples(folder),
        f'    {command} --prompt "..."',
        "With stock diffusers, no code of this project:",
        _usage(settings),
        _describe_results(results),
    ]
    (folder / MODEL_CARD).write_text("\n\n".join(filter(None, parts)) + "\n", encoding="utf-8")


def _metadata(settings):
    """Return the header that the hub reads; licence and base model are those of Wan's own weights."""
    teacher = Path(settings.teacher).name
    lines = ["library_name: diffusers", "pipeline_tag: text-to-image", "tags: [wan, distillation]"]
    if teacher.startswith("Wan2."):
        lines += ["license: apache-2.0", f"base_model: Wan-AI/{teacher}"]
    return "\n".join(["---", *lines, "---"])


def _describe(settings, few_steps):
    origin = "projected, and not yet trained," if settings.project_only else "distilled"
    width, height = image_size(settings.resolution)
    trained = f" It was trained for {_list(few_steps)} step{'s' * (few_steps != [1])}." if few_steps else ""
    return (
        f"A text-to-image model {origin} from `{Path(settings.teacher).name}`. It generates images of {width} x "
        f"{height} pixels in {settings.num_inference_steps} steps, without guidance.{trained}"
    )


def _list(numbers):
    *first, last = map(str, numbers)
    return f"{', '.join(first)} or {last}" if first else last


def _show_samples(folder):
    """Return the newest grid, with the teacher's images in its first row; "" if there is none."""
    grids = sorted((folder / SAMPLES).glob("step-*.png"))
    return f"![images of the teacher above those of the student]({SAMPLES}/{grids[-1].name})" if grids else ""


def _usage(settings):
    width, height = image_size(settings.resolution)
    return f"""\
    from diffusers import WanPipeline
    pipeline = WanPipeline.from_pretrained({settings.output_dir!r})
    frames = pipeline("...", height={height}, width={width}, num_frames=1, guidance_scale=1.0,
                      num_inference_steps={settings.num_inference_steps}, output_type="pil").frames
    frames[0][0].save("image.png")"""


def _describe_results(results):
    """Return a table with a row for each number of steps, rounded; "" without results."""
    counts = sorted(
        (int(name.rpartition("_")[2]) for name in results if name.startswith("image_error_")), reverse=True
    )
    if not counts:
        return ""
    num_judged = results.get("captions", 0)
    rows_by_steps = results.get("student_by_steps", {}) if num_judged >= MIN_CAPTIONS else {}
    accuracy = {int(count): row["accuracy"] for count, row in rows_by_steps.items()}
    headings = ["steps", *FIGURES, *(["captions drawn right"] if accuracy else [])]
    rows = [headings, ["---"] * len(headings)]
    for count in counts:
        own = [f"{results[f'{name}_{count}']:.2f}" for name in FIGURES.values()]
        rows.append([str(count), *own, *([f"{accuracy[count]:.1%}"] if accuracy else [])])
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    judged = f" The judge read {num_judged} held-out captions." if accuracy else ""
    return f"Measured on held-out prompts:\n\n{table}\n\n{EXPLANATION}{judged}"
