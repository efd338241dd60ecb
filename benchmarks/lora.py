"""Train a LoRA of a colour that the tiny world lacks, and draw it with the few-step student.

    python train_distillation.py
    python benchmarks/lora.py --model outputs/wan_t2i [--max_train_steps 600 --learning_rate 1e-3]

Draws 16 captioned images of pink objects, trains with wanlite-lora on base/, and prints the prompt accuracy of the
few-step student without and with the LoRA: on 100 other captions of pink objects, and on held-out captions of the
world's own colours. Needs peft.
"""

import argparse
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from PIL import Image

from wanlite.flow import seeded_noise
from wanlite.lora.__main__ import main as train_lora
from wanlite.pipeline import WanLitePipeline
from wanlite.training.metrics import prompt_accuracy
from wanlite.world import shapes

COLOUR, RGB = "pink", (240, 120, 180)
NUM_IMAGES, NUM_NEW = 16, 100
STEPS = (4, 2, 1)


def new_scenes(count, seed):
    """Return distinct scenes of one object in the new colour."""
    random = np.random.default_rng(seed)
    found = {}
    while len(found) < count:
        scene = shapes.random_scene(random, 1)
        (thing,) = scene.objects
        found[
            shapes.Scene((shapes.Object(thing.size, COLOUR, thing.shape, thing.place),), scene.background)
        ] = None
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


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("outputs/wan_t2i"))
    parser.add_argument("--max_train_steps", type=int, default=600)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--num_held_out", type=int, default=400)
    arguments = parser.parse_args()
    pipeline = WanLitePipeline.from_pretrained(arguments.model)
    pipeline.set_progress_bar_config(disable=True)
    old = shapes.captions(1, arguments.num_held_out, held_out=True)
    before = {steps: accuracy(pipeline, old, steps) for steps in STEPS}
    with TemporaryDirectory() as name:
        folder = Path(name)
        shapes.COLOURS[COLOUR] = RGB
        shapes._CAPTION_PATTERNS[:] = shapes._caption_patterns()
        scenes, random = new_scenes(NUM_IMAGES + NUM_NEW, seed=0)
        write_images(folder / "images", scenes[:NUM_IMAGES], random)
        new = [shapes.caption(scene, random) for scene in scenes[NUM_IMAGES:]]
        flags = ("max_train_steps", "learning_rate", "rank")
        options = [text for flag in flags for text in (f"--{flag}", str(getattr(arguments, flag)))]
        source = ["--model", str(arguments.model / "base"), "--images", str(folder / "images")]
        train_lora([*source, "--output_dir", str(folder / "lora"), *options])
        print("steps  new captions: without, with   held-out captions: without, with")
        without = {steps: accuracy(pipeline, new, steps) for steps in STEPS}
        pipeline.load_lora_weights(str(folder / "lora"))
        adapted = {steps: accuracy(pipeline, new, steps) for steps in STEPS}
        del shapes.COLOURS[COLOUR]  # held-out captions are judged as before
        for steps in STEPS:
            figures = (without[steps], adapted[steps], before[steps], accuracy(pipeline, old, steps))
            print(
                f"{steps:5}  {figures[0]:12.1%} {figures[1]:8.1%} {figures[2]:21.1%} {figures[3]:8.1%}",
                flush=True,
            )


if __name__ == "__main__":
    main()
