"""The settings of run_inference.py, one flag each; torch is not imported."""

from dataclasses import dataclass

from ..planning.settings import setting


@dataclass(frozen=True)
class Settings:
    model: str = setting(
        "./outputs/wan_t2i",
        "folder of a saved student",
        group="student and prompts",
        is_path=True,
        brief=True,
    )
    prompt: list[str] | None = setting(
        None, "prompt, can be repeated (default: the validation prompts of the run)", brief=True
    )
    prompts_file: str | None = setting(
        None,
        "text file with one prompt per line, instead of --prompt (default: none)",
        is_path=True,
        brief=True,
    )
    negative_prompt: str = setting(
        "", "prompt that guidance steers away from, with --guidance_scale above 1 (default: empty)"
    )
    num_inference_steps: int | None = setting(
        None, "sampling steps (default: from the student's run)", group="sampling", brief=True
    )
    guidance_scale: float = setting(
        1.0, "guidance in addition to the guidance distilled into the student; 1 = none"
    )
    height: int | None = setting(None, "pixels, divisible by 16 (default: as in training)", brief=True)
    width: int | None = setting(None, "pixels, divisible by 16 (default: as in training)", brief=True)
    seed: int = setting(0, "seed of the first image; each further image takes the next", brief=True)
    num_images_per_prompt: int = setting(1, "images for each prompt", brief=True)
    batch_size: int | None = setting(
        None, "images per batch; it may change the last bit of an image (default: as many as fit)"
    )
    image: str | None = setting(
        None,
        "JPEG, PNG or WebP file to change, of the size that is drawn (default: start from noise)",
        group="image to change",
        is_path=True,
    )
    strength: float | None = setting(
        None,
        "share of the steps that change --image, above 0 and at most 1; a larger one keeps less (default: 0.6)",
    )
    mask: str | None = setting(
        None,
        "image file of the size of --image: white is repainted, black is kept (default: change all)",
        aliases=("--mask_image",),
        is_path=True,
    )
    output_dir: str = setting(
        "./outputs/pictures", "folder for the PNG files", group="output and device", is_path=True, brief=True
    )
    device: str | None = setting(
        None, "cpu, cuda, cuda:N or mps (default: cuda if available, else cpu)", brief=True
    )
    dtype: str | None = setting(
        None,
        "dtype of the student (default: bfloat16 on GPUs that support it, else float32)",
        choices=("float32", "float16", "bfloat16"),
    )
    keep_embeddings: bool = setting(
        True, "keep the embeddings of prompts in ~/.cache/wanlite, if the text encoder has more than 1 GB"
    )
    sha256: str | None = setting(
        None,
        "refuse a model with another digest, of its weights or of all files that decide an image; every PNG records "
        "both (default: accept all)",
    )
    web: bool = setting(
        False, "serve a page to draw with; needs the extra wanlite[web]", group="page and server"
    )
    serve: bool = setting(
        False, "serve images over HTTP, as the OpenAI API has it; needs the extra wanlite[web]"
    )
    host: str | None = setting(
        None, "address to serve at; one that other machines reach needs a token (default: 127.0.0.1)"
    )
    port: int | None = setting(None, "port to serve at; 0 = any free one (default: 8000)")
    token: str | None = setting(
        None,
        "secret that requests must send; others see flags (default: the variable WANLITE_TOKEN, or none)",
    )
    queue_size: int | None = setting(
        None, "images that wait at most; requests beyond are refused (default: 32)"
    )
