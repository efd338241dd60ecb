"""Measure small text encoders and decoders: accuracy with each, and what the projected start is worth.

    python benchmarks/small_parts.py --model outputs/wan_t2i           # a student of a tiny world: accuracy of captions
    python benchmarks/small_parts.py --decoder emoji_teacher           # one decoder alone, on images of its world
    python benchmarks/small_parts.py --encoder_scale                   # project an encoder of UMT5-XXL's shape: peak memory

Every start gets the same steps, batches and random numbers. *random* is a network of the same shape with new weights.
Times are medians on one thread, of an image of 512 x 512.
"""

import argparse
import json
import resource
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from multiprocessing import Process
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np
import torch
from diffusers import AutoencoderKLWan
from safetensors.torch import save_file
from torch.utils.flop_counter import FlopCounterMode
from transformers import UMT5Config

from wanlite.data.autoencoder import (
    encode_images,
    load_autoencoder,
    load_video_autoencoder,
    to_pixels,
    use_single_frame_path,
)
from wanlite.data.single_frame import SingleFrameAutoencoder
from wanlite.parts.decoder import convolutions_as_matrices, decoder_loss, peak_signal_to_noise
from wanlite.parts.decoder_projection import project_decoder
from wanlite.parts.folder import load_pipeline
from wanlite.parts.loop import Schedule, train_part
from wanlite.parts.making import SmallParts, count_parameters
from wanlite.parts.options import choose_options, default_base_dim
from wanlite.parts.text_projection import EncoderFiles, TextShape, Tokens, project_text_encoder
from wanlite.small import Settings, WanLiteStudent, read_training_prompts
from wanlite.training.metrics import prompt_accuracy
from wanlite.training.run_folder import read_run
from wanlite.world.record import read_world

STARTS = ("projected", "random")
SIDE = 64  # latents of an image of 512 pixels
REPEATS = 5


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="folder of a trained student of a tiny world")
    parser.add_argument("--decoder", help="folder of a tiny teacher, to train its decoder alone")
    parser.add_argument("--encoder_scale", action="store_true", help="project an encoder of UMT5-XXL's shape")
    parser.add_argument("--layers", type=int, default=24, help="blocks of that encoder (default: 24)")
    parser.add_argument("--seeds", type=int, default=3, help="seeds of the training (default: 3)")
    parser.add_argument("--captions", type=int, default=400, help="held-out captions (default: 400)")
    parser.add_argument(
        "--base_dim", type=int, help="channels of the decoder (default: those of wanlite.small)"
    )
    parser.add_argument("--decoder_steps", type=int, default=1500, help="steps of a decoder (default: 1500)")
    parser.add_argument(
        "--reading_steps", type=int, default=1500, help="first steps of an encoder (default: 1500)"
    )
    parser.add_argument(
        "--text_velocity_steps", type=int, default=400, help="last steps of an encoder (default: 400)"
    )
    parser.add_argument("--learning_rate", type=float, default=2e-3, help="peak for AdamW (default: 2e-3)")
    parser.add_argument("--json", help="file to write the figures to")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found = {}
    if arguments.encoder_scale:
        found["encoder_scale"] = measure_projection(arguments.layers)
    if arguments.decoder:
        found["decoder"] = compare_decoders(arguments)
    if arguments.model:
        found["student"] = compare_students(arguments)
    if not found:
        parser.error("name --model, --decoder or --encoder_scale")
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(found, indent=2))


# ---- a student with small parts ----------------------------------------------------------------------------


def compare_students(arguments):
    """Print the accuracy with each combination of parts; returns the rows."""
    large = load_pipeline(arguments.model, WanLiteStudent, "cpu")
    record = read_run(arguments.model)
    world = read_world(record["settings"]["teacher"])
    captions = world.captions(99, arguments.captions, held_out=True)
    settings = Settings(
        model=arguments.model,
        decoder_steps=arguments.decoder_steps,
        reading_steps=arguments.reading_steps,
        text_velocity_steps=arguments.text_velocity_steps,
        decoder_base_dim=arguments.base_dim,
        learning_rate=arguments.learning_rate,
    )
    training, held_out = read_training_prompts(settings, record)
    rows = []
    for seed in range(arguments.seeds):
        options = replace(choose_options(settings, large.encoder.config, large.autoencoder.config), seed=seed)
        with tempfile.TemporaryDirectory() as folder:
            small, figures = SmallParts(large, options, training, held_out, Path(folder)).make()
        for text, decoder in (("large", "large"), ("small", "large"), ("large", "small"), ("small", "small")):
            mixed = replace(
                small if text == "small" else large,
                autoencoder=(small if decoder == "small" else large).autoencoder,
            )
            accuracy = {
                steps: prompt_accuracy(lambda prompts: mixed.images(prompts, steps), captions, world)[
                    "accuracy"
                ]
                for steps in (4, 1)
            }
            rows.append({"seed": seed, "text encoder": text, "decoder": decoder} | accuracy)
            print(rows[-1], flush=True)
        print(figures, flush=True)
        rows.append({"seed": seed, "figures": figures})
    print(format_accuracy([row for row in rows if "figures" not in row]))
    return rows


def format_accuracy(rows):
    """Return a table of mean and range over seeds."""
    lines = ["| text encoder | decoder | 4 steps | 1 step |", "|---|---|---|---|"]
    for parts in dict.fromkeys((row["text encoder"], row["decoder"]) for row in rows):
        own = [row for row in rows if (row["text encoder"], row["decoder"]) == parts]
        cells = [[row[steps] for row in own] for steps in (4, 1)]
        shown = [f"{np.mean(each):.3f} ({min(each):.3f} to {max(each):.3f})" for each in cells]
        lines.append(f"| {' | '.join([*parts, *shown])} |")
    return "\n".join(lines)


# ---- a decoder ---------------------------------------------------------------------------------------------


def compare_decoders(arguments):
    """Train a narrow decoder from both starts on images of a world; prints and returns the rows."""
    folder = Path(arguments.decoder)
    world = read_world(folder)
    autoencoder = load_video_autoencoder(folder).requires_grad_(False)
    wide = SingleFrameAutoencoder(autoencoder)
    random = np.random.default_rng(0)
    images = np.stack([world.draw(scene, random) for scene in world.scenes(0, 2000)])
    latents = encode_images(load_autoencoder(folder), to_pixels(images))
    training, held_out = latents[:-128], latents[-128:]
    base_dim = arguments.base_dim or default_base_dim(autoencoder.config)
    rows = []
    for seed in range(arguments.seeds):
        for start in STARTS:
            narrow = make_narrow(autoencoder, base_dim, training, start, seed)
            first = psnr(wide, narrow, held_out)
            narrow.requires_grad_(False)
            narrow.decoder.requires_grad_(True)
            began = time.process_time()
            with tempfile.TemporaryDirectory() as checkpoints, convolutions_as_matrices(narrow.decoder):
                schedule = Schedule(arguments.decoder_steps, arguments.learning_rate, seed, 10**9)
                train_part(
                    f"decoder, {start}",
                    Path(checkpoints),
                    narrow,
                    decoder_loss(wide, narrow, training, 16),
                    schedule,
                    {},
                )
            rows.append(
                {"seed": seed, "start": start, "first": first, "last": psnr(wide, narrow, held_out)}
                | {"cpu_seconds": round(time.process_time() - began)}
            )
            print(rows[-1], flush=True)
    rows.append(compare_cost(wide, SingleFrameAutoencoder(narrow)))
    print(rows[-1])
    return rows


def make_narrow(autoencoder, base_dim, latents, start, seed):
    narrow = project_decoder(autoencoder, base_dim, latents[:16])
    if start == "random":
        torch.manual_seed(seed)
        new = AutoencoderKLWan.from_config(narrow.config)
        new.post_quant_conv.load_state_dict(autoencoder.post_quant_conv.state_dict())
        narrow = use_single_frame_path(new)
    return narrow


def psnr(wide, narrow, latents):
    return round(peak_signal_to_noise(wide, SingleFrameAutoencoder(narrow), latents), 2)


def compare_cost(wide, narrow):
    """Return parameters, operations and milliseconds of both decoders for an image of 512 x 512."""
    row = {}
    latents = torch.randn(1, wide.config.z_dim, SIDE, SIDE)
    for name, each in (("large", wide), ("small", narrow)):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            each.decode(latents)
        seconds = []
        for _ in range(REPEATS):
            began = time.process_time()
            with torch.no_grad():
                each.decode(latents)
            seconds.append(time.process_time() - began)
        row[name] = {
            "parameters": count_parameters(each.decoder),
            "gflop": round(counter.get_total_flops() / 1e9, 2),
            "cpu_ms": round(1000 * statistics.median(seconds), 1),
        }
    return row


# ---- the real text encoder's size --------------------------------------------------------------------------


def measure_projection(layers):
    """Project an encoder of UMT5-XXL's shape and random weights with a falling spectrum; returns time and peak memory."""
    config = UMT5Config(
        vocab_size=256384,
        d_model=4096,
        d_kv=64,
        d_ff=10240,
        num_layers=layers,
        num_heads=64,
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=True,
    )
    with tempfile.TemporaryDirectory() as folder:
        # In a process of its own, whose memory does not count.
        writer = Process(target=write_encoder, args=(Path(folder) / "text_encoder", config))
        writer.start()
        writer.join()
        ids = torch.randint(config.vocab_size, (64, 16), generator=torch.Generator().manual_seed(0))
        tokens = Tokens(ids, torch.ones_like(ids))
        shape = TextShape(768, max(1, layers // 2), 12, 1920)
        reader = torch.randn(1024, 4096) / 64
        before, began = peak_memory(), time.perf_counter()
        project_text_encoder(EncoderFiles(folder), shape, tokens, reader)
        row = {"layers": layers, "seconds": round(time.perf_counter() - began)}
        row |= {"peak_gib": round(peak_memory(), 2), "peak_before_gib": round(before, 2)}
    print(row, flush=True)
    return row


def peak_memory():
    """Return the largest memory of this process so far, with mapped pages of files, in GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def write_encoder(folder, config):
    """Write an encoder in bfloat16, in shards of one block."""
    folder.mkdir()
    config.save_pretrained(folder)
    generator = torch.Generator().manual_seed(0)
    width, inner = config.d_model, config.num_heads * config.d_kv
    falling = (torch.arange(width) + 1.0) ** -0.5
    falling = falling / falling.square().mean().sqrt()

    def matrix(rows, columns):
        pool = torch.randn(1024, columns, generator=generator)
        return (pool[torch.randint(1024, (rows,), generator=generator)] / columns**0.5).bfloat16()

    index, shards = {}, layers_of(config, matrix, falling, inner)
    for number, tensors in enumerate(shards):
        name = f"model-{number + 1:05d}-of-{config.num_layers + 1:05d}.safetensors"
        save_file(tensors, folder / name)
        index |= dict.fromkeys(tensors, name)
    text = json.dumps({"metadata": {}, "weight_map": index})
    (folder / "model.safetensors.index.json").write_text(text)


def layers_of(config, matrix, falling, inner):
    """Yield the tensors of the embedding and of each block."""
    width = config.d_model
    yield {
        "shared.weight": (matrix(config.vocab_size, width) * falling.bfloat16() * 8),
        "encoder.final_layer_norm.weight": torch.ones(width).bfloat16(),
    }
    for number in range(config.num_layers):
        attention = f"encoder.block.{number}.layer.0"
        neurons = f"encoder.block.{number}.layer.1"
        buckets = (config.relative_attention_num_buckets, config.num_heads)
        yield {
            **{f"{attention}.SelfAttention.{name}.weight": matrix(inner, width) for name in "qkv"},
            f"{attention}.SelfAttention.o.weight": falling.bfloat16()[:, None] * matrix(width, inner),
            f"{attention}.SelfAttention.relative_attention_bias.weight": torch.zeros(buckets).bfloat16(),
            f"{attention}.layer_norm.weight": torch.ones(width).bfloat16(),
            f"{neurons}.DenseReluDense.wi_0.weight": matrix(config.d_ff, width),
            f"{neurons}.DenseReluDense.wi_1.weight": matrix(config.d_ff, width),
            f"{neurons}.DenseReluDense.wo.weight": falling.bfloat16()[:, None] * matrix(width, config.d_ff),
            f"{neurons}.layer_norm.weight": torch.ones(width).bfloat16(),
        }


if __name__ == "__main__":
    main()
