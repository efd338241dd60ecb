"""Change images of the tiny world with a student, and judge the new captions and the parts that should stay.

    python benchmarks/editing.py --model outputs/wan_t2i [--count 100 --steps 4]

Image-to-image: images of one object, drawn by rule and moved by 4 pixels, which captions do not express, and captions
with another colour. Inpainting: images of two objects, a mask over the half with the second one, and captions with
another colour of it. The first row is the given image after the autoencoder alone.

right   share of images with the new caption, as the judge reads them
error   mean difference to the given image with the colour changed by rule, of 255
kept    mean difference to the given image in the half that the mask keeps, of 255
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np
import torch

from wanlite import WanLitePipeline
from wanlite.data.autoencoder import to_images, to_pixels
from wanlite.flow import seeded_noise
from wanlite.world import shapes

BATCH_SIZE = 50
STRENGTHS = (0.25, 0.5, 0.75, 1.0)
HALF = shapes.IMAGE_SIZE // 2
SHIFT = (4, 4)  # pixels


def read_arguments():
    """Return the arguments of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="outputs/wan_t2i")
    parser.add_argument("--count", type=int, default=100, help="images of each row")
    parser.add_argument("--steps", type=int, default=4)
    return parser.parse_args()


def recolour(scene, random):
    """Return a scene whose last object has another colour."""
    *others, last = scene.objects
    colours = [colour for colour in shapes.COLOURS if colour != last.colour]
    return shapes.Scene((*others, replace(last, colour=str(random.choice(colours)))), scene.background)


def draw_pairs(count, num_objects):
    """Return images, the new captions, their scenes and the images by rule, and masks of the last object's half."""
    random = np.random.default_rng(num_objects)
    scenes = shapes.scenes(11, count, True, num_objects)
    new = [recolour(scene, random) for scene in scenes]
    images, ideals = (
        np.stack([shapes.draw(scene, np.random.default_rng(number)) for number, scene in enumerate(group)])
        for group in (scenes, new)
    )
    if num_objects == 1:
        images, ideals = (np.roll(group, SHIFT, axis=(1, 2)) for group in (images, ideals))
    masks = np.zeros((count, shapes.IMAGE_SIZE, shapes.IMAGE_SIZE), bool)
    for mask, scene in zip(masks, scenes):
        mask[
            (slice(None), slice(HALF, None)) if scene.objects[-1].place == "right" else slice(HALF, None)
        ] = True
    return images, [shapes.caption(scene, random) for scene in new], new, ideals, masks


def change(pipeline, captions, images, masks, strength, num_steps):
    """Return the changed images (B, height, width, 3) uint8, with the seeds 0, 1, ..."""
    side = shapes.IMAGE_SIZE // pipeline.vae_scale_factor_spatial
    noise = seeded_noise((pipeline.transformer.config.in_channels, side, side), range(len(captions)))
    found = []
    for start in range(0, len(captions), BATCH_SIZE):
        batch = slice(start, start + BATCH_SIZE)
        found += pipeline(
            captions[batch],
            image=images[batch],
            mask_image=None if masks is None else masks[batch],
            strength=strength,
            latents=noise[batch],
            num_inference_steps=num_steps,
        ).images
    return np.stack([np.asarray(image) for image in found])


def after_autoencoder(pipeline, images):
    """Return images (B, height, width, 3) uint8, encoded and decoded."""
    with torch.no_grad():
        return to_images(pipeline.decode(pipeline.encode(to_pixels(images))))


def difference(first, second, where=...):
    """Return the mean absolute difference of images, of 255."""
    return np.abs(first[where].astype(float) - second[where]).mean()


def main():
    """Print the table."""
    options = read_arguments()
    pipeline = WanLitePipeline.from_pretrained(options.model)
    pipeline.set_progress_bar_config(disable=True)
    print("| change | strength | right | error | kept |\n|---|---|---|---|---|")
    for name, num_objects in (("colour", 1), ("masked half", 2)):
        images, captions, scenes, ideals, masks = draw_pairs(options.count, num_objects)
        used = masks if num_objects == 2 else None
        plain = after_autoencoder(pipeline, images)
        kept = "" if used is None else f"{difference(plain, images, ~masks):.1f}"
        print(f"| {name} | autoencoder | | {difference(plain, images):.1f} | {kept} |")
        for strength in STRENGTHS:
            changed = change(pipeline, captions, images, used, strength, options.steps)
            right = np.mean([shapes.judge(image, scene)["whole"] for image, scene in zip(changed, scenes)])
            kept = "" if used is None else f"{difference(changed, images, ~masks):.1f}"
            print(
                f"| {name} | {strength} | {right:.2f} | {difference(changed, ideals):.1f} | {kept} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
