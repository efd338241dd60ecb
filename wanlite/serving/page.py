"""The page: fields and a gallery in front of the queue. Nothing is loaded from, or sent to, another address."""

import asyncio
import html
import os
import secrets
from collections.abc import AsyncIterator, Iterable
from pathlib import Path
from typing import Any

# Before gradio is imported, which reads both.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"

import gradio as gr
from fastapi import FastAPI

from ..files.image_files import image_names, save_image
from ..runtime.terminal import one_line
from .access import without_folders
from .drawing import Drawn
from .png_settings import read_png_settings
from .queue import DrawingQueue, QueueClosed, QueueFull
from .requests import RANDOM_SEEDS, Job, Limits, RequestError, make_jobs, untrained_size

MAX_UPLOAD = 64 * 2**20  # bytes
KEPT_SECONDS = 86400  # copies of images that a browser shows
OPEN_PAGES = 64  # requests of browsers at a time; the queue bounds their images
FONT, MONOSPACED = ("system-ui", "sans-serif"), ("ui-monospace", "monospace")  # no web fonts
CSS = """
.gradio-container { max-width: 1180px !important; width: 100% !important; margin: 0 auto !important; }
.gradio-container > main, .gradio-container .wrap.fillable { width: 100% !important; max-width: 1180px !important; }
#title { padding: 0.6rem 0 0.2rem; }
#title h1 { margin: 0; font-size: 1.6rem; line-height: 1.3; }
#title p { margin: 0; opacity: 0.65; }
#message p { margin: 0 0 0.5rem; padding: 0.5rem 0.8rem; border-radius: 8px; overflow-wrap: anywhere; }
#message p.note { background: rgba(120, 120, 120, 0.12); }
#message p.warning { background: rgba(245, 158, 11, 0.18); border-left: 4px solid #f59e0b; }
#message p.error { background: rgba(239, 68, 68, 0.15); border-left: 4px solid #ef4444; }
#dropped-title p { margin: 0.4rem 0 -0.4rem; font-size: 0.9rem; opacity: 0.75; }
#message .html-container { padding: 0; }
/* Every image is visible: columns shrink with the window, and the page scrolls, not the gallery. */
#images .grid-container { grid-template-columns: repeat(var(--grid-cols), minmax(0, 1fr)) !important; }
#images .grid-wrap { max-height: none !important; overflow: visible !important; }
"""
# A content security policy keeps the browser from loading anything from another address.
POLICY = (
    "default-src 'self' data: blob:; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; "
    "style-src 'self' 'unsafe-inline'; frame-ancestors 'self'"
)


class PolicyHeader:
    """ASGI middleware that adds the policy of the page to every answer."""

    def __init__(self, app: Any):
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def send_with_policy(message):
            if message["type"] == "http.response.start":
                headers = [*message["headers"], (b"content-security-policy", POLICY.encode())]
                message = message | {"headers": headers}
            await send(message)

        await self.app(scope, receive, send_with_policy if scope["type"] == "http" else send)


class Page:
    """The functions behind the fields; messages are HTML, and errors are messages."""

    def __init__(self, queue: DrawingQueue, limits: Limits, output_dir: str | Path, weights_sha256: str):
        self.queue, self.limits = queue, limits
        self.output_dir, self.weights_sha256 = Path(output_dir), weights_sha256

    async def show(self, *fields: Any) -> AsyncIterator[tuple[Any, Any]]:
        """Remove the message of the images before, and draw."""
        yield gr.skip(), ""
        yield await self.draw(*fields)

    async def draw(self, prompt: str, size: str, steps: Any, count: Any, seed: str) -> tuple[Any, Any]:
        """Draw and save images; returns the gallery and a message."""
        numbers = {"n": as_number(count), "steps": as_number(steps), "seed": as_number(seed)}
        try:
            jobs = make_jobs({"prompt": prompt, "size": size or "", **numbers}, self.limits)
            drawn = await self.queue.draw(jobs)
            paths = await asyncio.to_thread(self.save, drawn)
        except (RequestError, QueueFull, QueueClosed, OSError) as error:
            return gr.skip(), message(without_folders(str(error)), "error")
        except Exception as error:  # of any kind, out of memory too
            text = f"The images could not be drawn: {str(error) or type(error).__name__}"
            return gr.skip(), message(without_folders(text), "error")
        shown = [(str(path), f"seed {each.job.seed}") for each, path in zip(drawn, paths) if path]
        columns = next((count for count in (1, 2, 3) if len(shown) <= count**2), 4)
        return gr.Gallery(shown, columns=columns), self.describe(jobs[0], drawn, paths)

    def save(self, drawn: list[Drawn]) -> list[Path | None]:
        """Write the images as run_inference.py does; returns their paths, None for one that was not finite."""
        self.output_dir.mkdir(parents=True, exist_ok=True)
        return [
            None
            if each.image is None
            else save_image(
                each.image,
                self.output_dir,
                image_names(self.output_dir, each.job.prompt, each.job.seed),
                each.info,
            )
            for each in drawn
        ]

    def describe(self, job: Job, drawn: list[Drawn], paths: list[Path | None]) -> str:
        """Return the files and the warnings of drawn images."""
        written = [path.name for path in paths if path]
        named = written[0] if len(written) == 1 else f"{len(written)} images"
        texts = [message(f"Saved {named} in {self.output_dir.absolute()}", "note")] if written else []
        texts += [message(text, "warning") for text in filter(None, [untrained_size(job, self.limits)])]
        for text in dict.fromkeys(text for each in drawn for text in each.warnings):
            seeds = [str(each.job.seed) for each in drawn if text in each.warnings]
            of = "" if len(drawn) == 1 else f"seed {', '.join(seeds)}: "
            texts.append(message(of + text, "warning"))
        return "".join(texts)

    def restore(self, path: str | None) -> list[Any]:
        """Return prompt, size, steps, images, seed and message of a PNG that was dropped."""
        unchanged = [gr.skip()] * 5
        if path is None:
            return [*unchanged, gr.skip()]
        try:
            found = read_png_settings(path)
        except ValueError as error:
            return [*unchanged, message(str(error), "error")]
        steps = int(found["num_inference_steps"][:6])
        texts = [message("The settings of the image are in the fields.", "note")]
        if self.limits.few_steps and steps not in self.limits.few_steps:
            texts.append(message(f"This student was not trained for {steps} steps.", "warning"))
            steps = gr.skip()
        if found.get("weights_sha256", self.weights_sha256) != self.weights_sha256:
            texts.append(message("Another student drew this image: the result will differ.", "warning"))
        if found.get("guidance_scale", "1.0") not in ("1", "1.0"):
            text = f"The image was drawn with guidance {found['guidance_scale'][:20]}, a flag of the command."
            texts.append(message(text, "warning"))
        size = f"{found['width'][:6]} x {found['height'][:6]}"
        return [found["prompt"], size, steps, 1, found["seed"], "".join(texts)]


def as_number(value: Any) -> Any:
    """Return a field as a whole number if it is one, else unchanged, for the check to name."""
    text = str(value).strip()
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return int(text) if text.isascii() and text.isdigit() and len(text) < 20 else value


def message(text: str, kind: str) -> str:
    """Return a text of one line as HTML, of the kind note, warning or error."""
    text = text[:1].upper() + text[1:]
    return f'<p class="{kind}">{html.escape(one_line(text, 600))}</p>'


def make_blocks(page: Page, prompts: Iterable[str], seed: int) -> gr.Blocks:
    """Return the page: the fields at the left, the gallery at the right."""
    limits = page.limits
    with gr.Blocks(
        title=f"WanLite: {limits.model}", analytics_enabled=False, delete_cache=(3600, KEPT_SECONDS)
    ) as blocks:
        gr.Markdown(f"# WanLite\n{_plain(limits.model)}", elem_id="title")
        with gr.Row():
            with gr.Column(scale=2, min_width=320):
                fields, draw, new_seed, dropped = make_fields(limits, next(iter(prompts), ""), seed)
            with gr.Column(scale=3, min_width=320):
                shown = gr.HTML("", elem_id="message", padding=False)
                gallery = gr.Gallery(
                    show_label=False,
                    elem_id="images",
                    columns=2,
                    object_fit="contain",
                    format="png",
                    interactive=False,
                    buttons=["download", "fullscreen"],
                )
        private: dict[str, Any] = {"api_visibility": "private"}
        options = private | {"concurrency_limit": OPEN_PAGES}
        gr.on(
            [draw.click, fields[0].submit],
            page.show,
            fields,
            [gallery, shown],
            show_progress_on=gallery,
            **options,
        )
        new_seed.click(lambda: str(secrets.randbelow(RANDOM_SEEDS)), None, fields[-1], **private)
        dropped.upload(page.restore, dropped, [*fields, shown], show_progress="hidden", **private)
    return blocks.queue(max_size=OPEN_PAGES)


def make_fields(limits: Limits, prompt: str, seed: int) -> tuple[list[Any], Any, Any, Any]:
    """Return the fields prompt, size, steps, images and seed, and draw, new seed and the dropped file."""
    text = gr.Textbox(prompt, label="Prompt", lines=3, max_lines=8, submit_btn=False, elem_id="prompt")
    draw = gr.Button("Draw", variant="primary", elem_id="draw")
    sizes = [f"{width} x {height}" for width, height in limits.sizes or [(limits.width, limits.height)]]
    default = f"{limits.width} x {limits.height}"
    with gr.Row():
        size = gr.Dropdown(sizes, value=default, label="Size", allow_custom_value=True, elem_id="size")
        if limits.few_steps:
            choices = sorted(limits.few_steps)
            steps: Any = gr.Dropdown(choices, value=limits.num_steps, label="Steps", elem_id="steps")
        else:
            steps = gr.Number(limits.num_steps, label="Steps", precision=0, elem_id="steps")
    with gr.Row():
        count = gr.Slider(1, limits.max_images, 1, step=1, label="Images", elem_id="count")
        with gr.Column(min_width=140):
            number = gr.Textbox(str(seed), label="Seed", max_lines=1, elem_id="seed")
            new_seed = gr.Button("New seed", size="sm", elem_id="new-seed")
    gr.Markdown("Settings of an image: drop its PNG here", elem_id="dropped-title")
    dropped = gr.File(show_label=False, file_types=[".png"], height=120, elem_id="dropped")
    return [text, size, steps, count, number], draw, new_seed, dropped


def mount_page(app: FastAPI, page: Page, prompts: Iterable[str], seed: int) -> FastAPI:
    """Mount the page at the root of an application; its routes win."""
    app.add_middleware(PolicyHeader)
    return gr.mount_gradio_app(
        app,
        make_blocks(page, prompts, seed),
        path="/",
        show_error=False,
        max_file_size=MAX_UPLOAD,
        ssr_mode=False,
        enable_monitoring=False,
        footer_links=[],
        theme=gr.themes.Default(primary_hue="indigo", neutral_hue="slate", font=FONT, font_mono=MONOSPACED),
        css=CSS,
    )


def _plain(text: str) -> str:
    """Return a text without the characters that Markdown and HTML read."""
    return html.escape(
        "".join(letter if letter.isalnum() or letter in " .-" else "\\" + letter for letter in text)
    )
