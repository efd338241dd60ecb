"""Files that are published: they name no path of this machine."""

import json
from pathlib import Path

from benchmarks.hostile_inputs.builders import save_image
from benchmarks.hostile_inputs.trial import PROMPT, SAME, Input, call, draw
from wanlite import WanLitePipeline


def _holds(folder: Path, *words: str) -> bool:
    files = [path.read_bytes() for path in folder.rglob("*") if path.is_file()]
    return any(word.encode() in content for word in words for content in files)


def private_paths() -> list[Input]:
    kind = "paths of this machine"

    def drawing(*arguments):
        def way(place, more):
            draw(place, [*arguments, *more])
            return not _holds(place.images, str(place.student.parent))

        return way

    def saved(place):
        pipeline = WanLitePipeline.from_pretrained(place.student)
        pipeline.save_pretrained(place.beside / "saved")
        teacher = json.loads((place.student / "run.json").read_text())["settings"]["teacher"]
        return not _holds(place.beside / "saved", str(place.student.parent), str(Path(teacher).absolute()))

    def published(place):
        from wanlite.training.publishing import copy_without_paths

        record = json.loads((place.student / "run.json").read_text())
        record["settings"] |= {
            "teacher": str(place.student.parent / "wan"),
            "prompts": str(place.beside / "p.txt"),
        }
        record.setdefault("report", {})["directory"] = str(place.student.parent)
        (place.student / "run.json").write_text(json.dumps(record))
        return not _holds(copy_without_paths(place.student, "someone/student"), str(place.student.parent))

    def photo(place):
        save_image(place.beside / "a.png")
        return ["--image", place.beside / "a.png", "--mask", place.beside / "a.png"]

    def prompts(place):
        (place.beside / "p.txt").write_text(PROMPT)
        return ["--prompts_file", place.beside / "p.txt"]

    nothing = lambda place: None  # noqa: E731
    rows = [
        ("an image", SAME, nothing, drawing()),
        ("a grid", SAME, nothing, drawing("--num_images_per_prompt", 2)),
        ("an image that was changed", SAME, photo, drawing()),
        ("an image of a file of prompts", SAME, prompts, drawing()),
        ("a saved pipeline", SAME, nothing, call(saved)),
        ("a published run", SAME, nothing, call(published)),
    ]
    return [Input(kind, *row) for row in rows]
