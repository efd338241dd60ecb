"""A request, from JSON or from the page -> the images to draw, or a refusal in one line. No torch."""

import json
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from ..data.tables import check_text
from ..files.json_files import refuse_duplicates
from ..runtime.terminal import one_line
from ..schedule import TIMESTEPS
from ..training.sampling_defaults import size_warning

MAX_BODY = 2**16  # bytes; a prompt has at most 512 tokens
MAX_PROMPT = 10_000  # characters
MAX_IMAGES = 10  # of a request, as in the OpenAI API
MAX_SHOWN = 60  # characters of a value in a refusal
RANDOM_SEEDS = 2**31
IGNORED = ("user", "quality", "style", "background", "moderation")  # of the OpenAI API: one student draws all
EXPECTED = {"response_format": "b64_json", "output_format": "png", "stream": False}
FIELDS = ("prompt", "model", "n", "size", "steps", "seed", *EXPECTED, *IGNORED)
SIZE = re.compile(r"\s*([0-9]{1,6})\s*[xX×*]\s*([0-9]{1,6})\s*")


@dataclass(frozen=True)
class Limits:
    """The images that a served student draws: the defaults of a request and its bounds."""

    model: str  # the name in answers
    width: int
    height: int
    num_steps: int
    few_steps: tuple[int, ...]  # the trained numbers of steps; () for any
    sizes: tuple[tuple[int, int], ...]  # the trained (width, height); () if they are unknown
    unit: int  # pixels; divides width and height
    max_side: int
    max_pixels: int  # of an image
    max_images: int = MAX_IMAGES


class Job(NamedTuple):
    """An image to draw; those of one `shape` can be drawn together."""

    prompt: str
    seed: int
    num_steps: int
    width: int
    height: int

    @property
    def shape(self) -> tuple[int, int, int]:
        return self[2:]


class RequestError(ValueError):
    """A refused request: `param` is the field at fault, `status` the code of the answer."""

    def __init__(
        self, message: str, param: str | None = None, code: str = "invalid_value", status: int = 400
    ):
        super().__init__(message)
        self.param, self.code, self.status = param, code, status


def read_request(body: bytes, limits: Limits) -> list[Job]:
    """Return the images of a JSON body of /v1/images/generations; raises RequestError."""
    try:
        values = json.loads(body, object_pairs_hook=refuse_duplicates)
    except (ValueError, RecursionError):
        raise RequestError("the body is not valid JSON.", code="invalid_json") from None
    if not isinstance(values, dict):
        raise RequestError(f"the body is {_shown(values)}, expected a JSON object.", code="invalid_json")
    if unknown := values.keys() - set(FIELDS):
        name = one_line(min(unknown), MAX_SHOWN)
        raise RequestError(f"{name!r} is unknown, expected {', '.join(FIELDS)}.", name, "unknown_parameter")
    given = {name: value for name, value in values.items() if value is not None}
    for name, expected in EXPECTED.items():
        if given.get(name, expected) != expected:
            raise RequestError(
                f"{name} is {_shown(given[name])}, expected {_shown(expected)}: the only one here.", name
            )
    if given.get("model", limits.model) != limits.model:
        raise RequestError(
            f"model {_shown(given['model'])} is not served here; the model is {limits.model!r}.",
            "model",
            "model_not_found",
            404,
        )
    jobs = make_jobs(given, limits)
    _check_trained(jobs[0], limits)
    return jobs


def make_jobs(given: Mapping[str, Any], limits: Limits) -> list[Job]:
    """Return the images of the fields prompt, n, size, steps and seed; raises RequestError."""
    prompt = _check_prompt(given.get("prompt"))
    count = _check_number("n", given.get("n", 1), 1, limits.max_images)
    width, height = _check_size(given.get("size", "auto"), limits)
    num_steps = _check_number("steps", given.get("steps", limits.num_steps), 1, TIMESTEPS)
    if limits.few_steps and num_steps not in limits.few_steps:
        raise RequestError(f"steps is {num_steps}, expected one of {_listed(limits.few_steps)}.", "steps")
    seed = given.get("seed", secrets.randbelow(RANDOM_SEEDS))
    _check_number("seed", seed, 0, 2**63 - count)
    return [Job(prompt, seed + index, num_steps, width, height) for index in range(count)]


def untrained_size(job: Job, limits: Limits) -> str | None:
    """Return a warning if the student was not trained at the size of an image, else None."""
    return size_warning((job.width, job.height), limits.sizes, "{} x {}")


def _check_trained(job: Job, limits: Limits) -> None:
    """A program reads no warnings: an untrained size, whose images may fail, is refused."""
    if limits.sizes and (job.width, job.height) not in limits.sizes:
        sizes = _listed(f"{width}x{height}" for width, height in limits.sizes)
        raise RequestError(
            f"size is {job.width}x{job.height}, expected one of the trained sizes: {sizes}.", "size"
        )


def _check_prompt(prompt: Any) -> str:
    if not isinstance(prompt, str) or not prompt.strip():
        raise RequestError(f"prompt is {_shown(prompt)}, expected a text.", "prompt")
    if len(prompt) > MAX_PROMPT:
        raise RequestError(
            f"prompt has {len(prompt):,} characters, expected at most {MAX_PROMPT:,}.", "prompt"
        )
    try:
        check_text(prompt, "prompt")
    except ValueError as error:
        raise RequestError(str(error), "prompt") from None
    return prompt


def _check_number(name: str, value: Any, least: int, most: int) -> int:
    if type(value) is not int or not least <= value <= most:
        raise RequestError(f"{name} is {_shown(value)}, expected a whole number, {least} to {most}.", name)
    return value


def _check_size(size: Any, limits: Limits) -> tuple[int, int]:
    """Return (width, height) of a size "WIDTHxHEIGHT" or "auto"."""
    if size == "auto":
        return limits.width, limits.height
    found = SIZE.fullmatch(size) if isinstance(size, str) else None
    if not found:
        raise RequestError(f"size is {_shown(size)}, expected WIDTHxHEIGHT in pixels, or auto.", "size")
    width, height = int(found[1]), int(found[2])
    for side in (width, height):
        if not 0 < side <= limits.max_side or side % limits.unit:
            nearest = min(max(1, round(side / limits.unit)) * limits.unit, limits.max_side)
            raise RequestError(
                f"size is {width}x{height}, expected multiples of {limits.unit}, at most {limits.max_side}; the "
                f"nearest to {side} is {nearest}.",
                "size",
            )
    if width * height > limits.max_pixels:
        raise RequestError(
            f"size is {width}x{height}, more than this machine's memory takes: at most {limits.max_pixels:,} "
            "pixels.",
            "size",
        )
    return width, height


def _listed(values: Any) -> str:
    return ", ".join(map(str, values))


def _shown(value: Any) -> str:
    """Return a JSON value as one short line."""
    if isinstance(value, Mapping) or (isinstance(value, Sequence) and not isinstance(value, str)):
        return "an object" if isinstance(value, Mapping) else "a list"
    return one_line(
        json.dumps(value, ensure_ascii=False) if not isinstance(value, bytes) else "bytes", MAX_SHOWN
    )
