"""A saved student behind a page or a server, from its settings to the end of the process."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL.PngImagePlugin import PngInfo

from ..files.file_names import RUN
from ..generation.images import choose_batch_size, digests_of, fitting_pixels, text_chunks
from ..generation.settings import Settings
from ..generation.student import StudentPipeline, encoder_device
from ..runtime.devices import choose_device
from ..runtime.terminal import one_line
from ..schedule import recorded_schedule
from ..training.run_folder import read_run
from ..training.sampling_defaults import trained_sizes
from .address import QUEUE_SIZE, choose_address
from .drawing import PromptEncoder, ServedStudent
from .launch import open_socket, private_folder, run_server, url_of
from .queue import DrawingQueue
from .requests import MAX_IMAGES, Job, Limits
from .server import make_app


def serve(settings: Settings, prompts: list[str]) -> None:
    """Load the student and its text encoder once, and draw for a page or for requests until the process is stopped."""
    address = choose_address(settings.host, settings.port, settings.token)
    # The address is taken before the student is loaded, which takes longer.
    with open_socket(address) as listener, private_folder():
        device = choose_device(settings.device)
        pipeline = StudentPipeline(settings.model, device, settings.dtype, settings.sha256)
        settings = replace(settings, dtype=str(pipeline.dtype).removeprefix("torch."))
        queue = make_queue(settings, pipeline)
        limits = served_limits(settings, pipeline)
        app = make_app(queue, limits, address.token, has_api=settings.serve)
        url = url_of(listener, address.host)
        if settings.web:
            from .page import Page, mount_page  # gradio takes seconds

            page = Page(queue, limits, settings.output_dir, pipeline.weights_sha256)
            app = mount_page(app, page, prompts, settings.seed)
            saved = Path(settings.output_dir).absolute()
            print(f"page      {url}   (images are saved in {saved})", flush=True)
        if settings.serve:
            print(f"server    {url}/v1/images/generations   model {limits.model}", flush=True)
        print(f"drawing with {settings.model} on {device}; Ctrl-C stops", flush=True)
        run_server(app, queue, listener)


def make_queue(settings: Settings, pipeline: StudentPipeline) -> DrawingQueue:
    """Return the queue in front of a student; each job has its own size and steps."""

    def adapt(job: Job, batch_size: int | None) -> Settings:
        size: dict[str, Any] = {
            "width": job.width,
            "height": job.height,
            "num_inference_steps": job.num_steps,
        }
        return replace(settings, batch_size=batch_size, **size)

    def describe(job: Job, batch_size: int) -> PngInfo:
        return text_chunks(adapt(job, batch_size), job.prompt, job.seed, digests_of(pipeline))

    device = str(pipeline.device)
    encoder = PromptEncoder(settings.model, encoder_device(settings.model, device))
    student = ServedStudent(pipeline, encoder, describe, settings.guidance_scale, settings.negative_prompt)
    return DrawingQueue(
        student.draw,
        lambda job: settings.batch_size or choose_batch_size(adapt(job, None), pipeline.device),
        settings.queue_size or QUEUE_SIZE,
    )


def served_limits(settings: Settings, pipeline: StudentPipeline) -> Limits:
    """Return the images that a served student draws; the defaults are those of the settings."""
    run = read_run(settings.model)
    unit = pipeline.pixels_per_token
    return Limits(
        model=one_line(Path(settings.model).absolute().name),
        width=settings.width or 0,
        height=settings.height or 0,
        num_steps=settings.num_inference_steps or 0,
        few_steps=tuple(recorded_schedule(run, Path(settings.model) / RUN).get("few_steps") or ()),
        sizes=tuple(trained_sizes(run, unit, RUN)),
        unit=unit,
        max_side=unit * pipeline.student.config.rope_max_seq_len,
        max_pixels=fitting_pixels(pipeline.device),
        max_images=min(MAX_IMAGES, settings.queue_size or QUEUE_SIZE),
    )
