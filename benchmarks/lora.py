"""Train a LoRA of a shape that the tiny world lacks, and draw it with the few-step student.

    python train_distillation.py
    python benchmarks/lora.py --model outputs/wan_t2i [--shape diamond] [--train_on outputs/wan_t2i/base]

Draws 16 captioned images of one object of the new shape each, trains with wanlite-lora, and prints the prompt accuracy
of the student without and with the LoRA: on 100 other captions of the shape, and on held-out captions of the world's own
shapes. Options of wanlite-lora are passed on. The shape is new because the tiny autoencoder does not reproduce new
colours. Needs peft.
"""

import argparse
import sys
import time
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from PIL import Image

from wanlite.data.autoencoder import encode_images, load_autoencoder, to_images, to_pixels
from wanlite.flow import seeded_noise
from wanlite.lora.__main__ import main as train_lora
from wanlite.pipeline import WanLitePipeline
from wanlite.training.metrics import prompt_accuracy
from wanlite.world import shapes

DISTANCES = {  # of a pixel from the edge of a shape, negative inside
    "bar": lambda across, down, radius: np.maximum(abs(across) - radius, abs(down) - 0.45 * radius),
    "diamond": lambda across, down, radius: (abs(across) + abs(down)) / 2**0.5 - 0.75 * radius,
}
NUM_IMAGES, NUM_NEW = 16, 100
STEPS = (4, 2, 1)
DEFAULT_COVERAGE = shapes.coverage


def coverage(shape, radius, x, y):
    """Return the coverage of each pixel, as shapes.coverage() does, also for a new shape."""
    if shape not in DISTANCES:
        return DEFAULT_COVERAGE(shape, radius, x, y)
    across, down = np.meshgrid(*(np.arange(shapes.IMAGE_SIZE, dtype=np.float32) + 0.5 - at for at in (x, y)))
    return np.clip(0.5 - DISTANCES[shape](across, down, radius), 0, 1)


def add_shape(shape):
    """Add a shape to the world's drawing code and to its judge; captions of other shapes stay the same."""
    shapes.SHAPES = (*shapes.SHAPES, shape)
    shapes.coverage = coverage
    shapes._CAPTION_PATTERNS[:] = shapes._caption_patterns()


def new_scenes(count, seed, shape):
    """Return distinct scenes of one object of a new shape."""
    random = np.random.default_rng(seed)
    found = {}
    while len(found) < count:
        scene = shapes.random_scene(random, 1)
        found[shapes.Scene((replace(scene.objects[0], shape=shape),), scene.background)] = None
    return list(found), random


def write_images(folder, scenes, random):
    folder.mkdir()
    for number, scene in enumerate(scenes):
        Image.fromarray(shapes.draw(scene, random)).save(folder / f"{number:02d}.png")
        (folder / f"{number:02d}.txt").write_text(shapes.caption(scene, random))


def accuracy(pipeline, captions, steps):
    """Return the share of captions that the judge reads in the images, with seeds 0, 1, ..."""

    def generate(texts):
        noise = seeded_noise((pipeline.transformer.config.in_channels, 8, 8), range(len(texts)))
        images = []
        for start in range(0, len(texts), 50):
            rows = slice(start, start + 50)
            images += list(
                pipeline(texts[rows], latents=noise[rows], num_inference_steps=steps, output_type="np").images
            )
        return (np.stack(images) * 255).round().astype(np.uint8)

    return prompt_accuracy(generate, captions)["accuracy"]


def autoencoder_accuracy(folder, scenes, random):
    """Return the share of scenes that the judge reads in images after encoding and decoding: the highest to expect."""
    autoencoder = load_autoencoder(folder, "cpu")
    latents = encode_images(autoencoder, to_pixels(np.stack([shapes.draw(each, random) for each in scenes])))
    images = to_images(WanLitePipeline.from_pretrained(folder).decode(latents.float()))
    return np.mean([shapes.read_image(image) == scene for image, scene in zip(images, scenes)])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("outputs/wan_t2i"))
    parser.add_argument("--train_on", type=Path, help="train on another student, as base/ (default: --model)")
    parser.add_argument("--shape", choices=DISTANCES, default="bar")
    parser.add_argument("--num_held_out", type=int, default=200)
    arguments, options = parser.parse_known_args()  # all others are those of wanlite-lora
    pipeline = WanLitePipeline.from_pretrained(arguments.model)
    pipeline.set_progress_bar_config(disable=True)
    old, others = shapes.captions(1, arguments.num_held_out, held_out=True), shapes.captions(2, 256)
    before = {steps: accuracy(pipeline, old, steps) for steps in STEPS}
    add_shape(arguments.shape)
    scenes, random = new_scenes(NUM_IMAGES + NUM_NEW, 0, arguments.shape)
    new = [shapes.caption(scene, random) for scene in scenes[NUM_IMAGES:]]
    highest = autoencoder_accuracy(arguments.model, scenes[NUM_IMAGES:], random)
    print(f"new captions after encoding and decoding alone: {highest:.1%}")
    without = {steps: accuracy(pipeline, new, steps) for steps in STEPS}
    with TemporaryDirectory() as name:
        folder = Path(name)
        write_images(folder / "images", scenes[:NUM_IMAGES], random)
        (folder / "others.txt").write_text("\n".join(others))
        files = {"images": folder / "images", "prompts": folder / "others.txt", "output_dir": folder / "lora"}
        files["model"] = arguments.train_on or arguments.model
        began = time.perf_counter()
        train_lora([text for flag, path in files.items() for text in (f"--{flag}", str(path))] + options)
        print(f"trained in {time.perf_counter() - began:.0f} s")
        pipeline.load_lora_weights(str(folder / "lora"))
    print("steps  new captions: without, with   held-out captions: without, with")
    for steps in STEPS:
        adapted = accuracy(pipeline, new, steps), accuracy(pipeline, old, steps)
        print(
            f"{steps:5}  {without[steps]:12.1%} {adapted[0]:8.1%} {before[steps]:21.1%} {adapted[1]:8.1%}",
            flush=True,
        )


if __name__ == "__main__":
    main()
