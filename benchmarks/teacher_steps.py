"""Measure what steps of the guided teacher are worth: accuracy of captions, and distance to its images in 40 steps.

    python benchmarks/teacher_steps.py --teacher tiny        # a minute on one core
    python benchmarks/teacher_steps.py --teacher emoji       # three minutes

All numbers of steps have the same captions and noise. "Image error" is the squared distance between the latents and
those in 40 steps, divided by the variance of the latter.
"""

import argparse
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch

from train_distillation import Settings
from wanlite.data.autoencoder import decode_latents, load_autoencoder, to_images
from wanlite.data.text_encoder import encode_prompts, load_text_encoder
from wanlite.flow import make_scheduler, sample, seeded_noise
from wanlite.network import pack_text
from wanlite.planning.resolve import choose_teacher, complete
from wanlite.teacher.checkpoint import open_teacher_files
from wanlite.teacher.model import Teacher
from wanlite.training.metrics import prompt_accuracy
from wanlite.training.teacher_data import teacher_velocity
from wanlite.world.record import read_world

REFERENCE = 40
BATCH_SIZE = 50


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--teacher", default="tiny", help="tiny or emoji (default: tiny)")
    parser.add_argument("--captions", type=int, default=200, help="held-out captions (default: 200)")
    parser.add_argument("--steps", type=int, nargs="+", default=[20, 16, 12, 8], help="numbers of steps")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    folder = choose_teacher(arguments.teacher)
    world = read_world(folder)
    captions = [
        caption
        for count in (1, 2)
        for caption in world.captions(1000, arguments.captions // 2, held_out=True, num_objects=count)
    ]
    draw = make_drawing(folder, captions, world.IMAGE_SIZE)
    print("| steps | drawn right | image error | CPU seconds |\n|---|---|---|---|", flush=True)
    reference = None
    for steps in (REFERENCE, *arguments.steps):
        began = time.process_time()
        latents, images = draw(steps)
        seconds = time.process_time() - began
        reference = latents if reference is None else reference
        error = (latents - reference).square().mean() / reference.var(dim=0).mean()
        right = prompt_accuracy(lambda _: images, captions, world)["accuracy"]
        print(f"| {steps} | {right:.3f} | {error:.4f} | {seconds:.0f} |", flush=True)


def make_drawing(folder, captions, size):
    """Return a function of a number of steps: (latents (B, C, H, W), images (B, size, size, 3)) of the captions."""
    settings = complete(Settings(teacher=str(folder)))
    teacher, autoencoder = Teacher(open_teacher_files(folder)), load_autoencoder(folder)
    *embeddings, empty = encode_prompts(*load_text_encoder(folder), [*captions, ""])
    velocity_for = teacher_velocity(teacher, settings, empty)
    side = size // autoencoder.config.scale_factor_spatial
    shape = (autoencoder.config.z_dim, side, side)

    @torch.no_grad()
    def draw(steps):
        scheduler, chunks = make_scheduler(settings.flow_shift), []
        for start in range(0, len(captions), BATCH_SIZE):
            text = pack_text(embeddings[start : start + BATCH_SIZE])
            noise = seeded_noise(shape, range(start, start + len(text.tokens)))
            chunks.append(sample(velocity_for(text), noise, scheduler, steps))
        latents = torch.cat(chunks)
        return latents, to_images(decode_latents(autoencoder, latents))

    return draw


if __name__ == "__main__":
    main()
