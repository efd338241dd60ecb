"""Compare dtypes and quantised forms of a saved student: size, time and prompt accuracy.

    pip install torchao gguf                          # without one, its rows are left out
    python benchmarks/small_files.py --model outputs/wan_t2i [--count 200 --steps 4 --device cuda]

MB      memory of the student's parameters and buffers
ms      median time of the steps of one image, without the text encoder and the autoencoder
right   share of held-out captions of the tiny world, as the judge reads the images
off     mean difference to the images of the float32 student, of 255
"""

import argparse
import statistics
import sys
import time
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np
import torch

from wanlite import WanLitePipeline
from wanlite.export.gguf import DTYPES, write_gguf
from wanlite.flow import seeded_noise
from wanlite.world import shapes

BATCH_SIZE = 50
REPEATS = 9


def read_arguments():
    """Return the arguments of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="outputs/wan_t2i")
    parser.add_argument("--count", type=int, default=200, help="captions")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--device", default="cpu")
    return parser.parse_args()


# ---- formats: name -> dtype of loading, and a change of the loaded student ---------------------------------


def cast_layers(pipeline, folder):
    """Store weights in float8 and compute in bfloat16, with diffusers' hooks; norms and embeddings keep theirs."""
    pipeline.transformer.enable_layerwise_casting(
        storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16
    )


def quantise(name, options, pipeline, folder):
    """Quantise the linear layers with one of torchao's configs."""
    from torchao import quantization

    quantization.quantize_(pipeline.transformer, getattr(quantization, name)(**options))


def read_gguf(dtype, pipeline, folder):
    """Write the student as a GGUF file, and load it in place of the student."""
    from diffusers import GGUFQuantizationConfig, WanTransformer3DModel

    with TemporaryDirectory() as place:
        path = str(Path(place) / "student.gguf")
        write_gguf(path, pipeline.transformer.state_dict(), dtype, "student")
        pipeline.transformer = WanTransformer3DModel.from_single_file(
            path,
            config=folder,
            quantization_config=GGUFQuantizationConfig(compute_dtype=torch.bfloat16),
            dtype=torch.bfloat16,
        ).to(pipeline.vae.device)


def formats():
    """Return {format: (dtype, change or None)}."""
    found = {
        "float32": (torch.float32, None),
        "bfloat16": (torch.bfloat16, None),
        "float8, layerwise casting": (torch.bfloat16, cast_layers),
    }
    if find_spec("torchao"):
        kinds = {
            "float8, torchao": ("Float8WeightOnlyConfig", {}),
            "int8, torchao": ("Int8WeightOnlyConfig", {}),
            "int4 in groups of 32, torchao": (
                "IntxWeightOnlyConfig",
                {"weight_dtype": torch.int4, "granularity": per_group()},
            ),
        }
        found |= {name: (torch.bfloat16, partial(quantise, *kind)) for name, kind in kinds.items()}
    if find_spec("gguf"):
        found |= {f"{dtype}, GGUF": (torch.float32, partial(read_gguf, dtype)) for dtype in DTYPES}
    return found


def per_group():
    """Return torchao's granularity of one scale for 32 weights."""
    from torchao.quantization import PerGroup

    return PerGroup(32)


# ---- figures -----------------------------------------------------------------------------------------------


def num_bytes(module):
    """Return the bytes of a module's parameters and buffers; those of quantised tensors are of their parts."""

    def count(tensor):
        if not hasattr(tensor, "__tensor_flatten__"):
            return tensor.nbytes
        names, _ = tensor.__tensor_flatten__()
        return sum(count(getattr(tensor, name)) for name in names)

    return sum(map(count, (*module.parameters(), *module.buffers())))


def draw(pipeline, embeddings, noise, num_steps, output_type):
    """Return the images of prompt embeddings and noise."""
    return pipeline(
        prompt_embeds=embeddings, latents=noise, num_inference_steps=num_steps, output_type=output_type
    ).images


def measure_time(pipeline, embeddings, noise, num_steps):
    """Return the median milliseconds of the steps of one image."""
    seconds = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        draw(pipeline, embeddings[:1], noise[:1], num_steps, "latent").cpu()
        seconds.append(time.perf_counter() - began)
    return 1000 * statistics.median(seconds)


def draw_all(pipeline, embeddings, noise, num_steps):
    """Return all images (B, height, width, 3) uint8."""
    batches = (slice(start, start + BATCH_SIZE) for start in range(0, len(noise), BATCH_SIZE))
    images = [
        image
        for batch in batches
        for image in draw(pipeline, embeddings[batch], noise[batch], num_steps, "pil")
    ]
    return np.stack([np.asarray(image) for image in images])


def main():
    """Print the table."""
    options = read_arguments()
    random = np.random.default_rng(0)
    scenes = shapes.scenes(12, options.count, held_out=True)
    captions = [shapes.caption(scene, random) for scene in scenes]
    embeddings, noise, expected = None, None, None
    print("| format | MB | ms | right | off |\n|---|---|---|---|---|")
    for name, (dtype, change) in formats().items():
        pipeline = WanLitePipeline.from_pretrained(options.model, dtype=dtype).to(options.device)
        pipeline.set_progress_bar_config(disable=True)
        if embeddings is None:
            embeddings = pipeline.encode_prompt(captions, do_classifier_free_guidance=False)[0]
            side = shapes.IMAGE_SIZE // pipeline.vae_scale_factor_spatial
            noise = seeded_noise((pipeline.transformer.config.in_channels, side, side), range(len(captions)))
        if change:
            change(pipeline, options.model)
        images = draw_all(pipeline, embeddings, noise, options.steps)
        expected = images if expected is None else expected
        right = np.mean([shapes.judge(image, scene)["whole"] for image, scene in zip(images, scenes)])
        off = np.abs(images.astype(float) - expected).mean()
        print(
            f"| {name} | {num_bytes(pipeline.transformer) / 1e6:.2f} "
            f"| {measure_time(pipeline, embeddings, noise, options.steps):.0f} | {right:.3f} | {off:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
