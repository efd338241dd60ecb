"""Train a tiny teacher: a complete Wan2.2 checkpoint in the diffusers layout, only small, from scenes drawn
by rule.

    python tools/train_tiny_teacher.py                                # of shapes: into ./tiny_teacher, about an hour on one core
    python tools/train_tiny_teacher.py --stages experts               # one stage again
    python tools/train_tiny_teacher.py --world emoji --threads 2      # of emoji: into ./emoji_teacher; the experts want a GPU
    python tools/train_tiny_teacher.py --world emoji --stages experts --device cuda --threads 16      # minutes
    python tools/train_tiny_teacher.py --world emoji --judge 100      # judge the last save, with 100 captions a kind

Stages: autoencoder -> text -> experts -> pipeline. A finished stage is skipped, and after a kill the same command
resumes from at most a minute earlier. A stage whose figures miss the gates of its recipe ends the run. Settings,
figures and minutes go to training.json beside the weights. Auxiliary heads (the position of a token, the object in
it, the object of a word) are discarded after training: the networks that remain are stock.
"""

import argparse
import json
import math
import multiprocessing
import shutil
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import diffusers
import numpy as np
import torch
from diffusers import AutoencoderKLWan, WanPipeline, WanTransformer3DModel
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from tools.recipes import GRID, RECIPES, Recipe  # noqa: E402
from wanlite import flow, schedule  # noqa: E402
from wanlite.data import autoencoder as vae  # noqa: E402
from wanlite.data import text_encoder as text  # noqa: E402
from wanlite.network import OneFrameBlock, one_frame_velocity, pack_states, pack_text  # noqa: E402
from wanlite.training.metrics import prompt_accuracy  # noqa: E402

SEED = 22
SHIFT = 3.0
BOUNDARY = 0.875  # noise level from which the high-noise expert is used
PROMPT_DROPOUT = 0.1
SHARD = 10_000  # scenes made between two saves
CAPTIONS = 8  # of each scene
TOKENS = 24  # no caption of a world is longer
IGNORED = -100  # a label that no loss counts
SAVE_SECONDS = 60


@dataclass(frozen=True)
class Run:
    recipe: Recipe
    folder: Path  # the checkpoint
    work: Path  # resumable state, latents
    device: str
    threads: int

    @property
    def world(self):
        return self.recipe.world


# ---- one loop for every stage ------------------------------------------------------------------------------


def fit(name, trained, loss_of, run):
    """Train the modules in `trained` and leave their EMA weights in place; returns the minutes spent.

    `loss_of(random, torch_generator, progress 0..1)` returns a loss and a dict of figures; its randomness is
    a function of the step, so that a killed run resumes to the same end.
    """
    plan = run.recipe.plan[name]
    trained.to(run.device)
    parameters = [p for p in trained.parameters() if p.requires_grad]
    optimizers = make_optimizers(trained, plan)
    ema = EMAModel(parameters, decay=plan["ema"], foreach=True)
    path, first, spent = run.work / f"{name}.pt", 0, 0.0
    if path.exists():
        first, spent = load_state(path, trained, ema, optimizers, run.device)
    began = saved_at = time.time()
    bar = tqdm(range(first, plan["steps"]), initial=first, total=plan["steps"], desc=name, mininterval=5)
    for step in bar:
        progress = step / plan["steps"]
        scale = min(1.0, (step + 1) / 100) * decayed(progress, plan["decay"])
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * scale
        stage_seed = [SEED, sum(name.encode()), step]
        random = np.random.default_rng(stage_seed)
        generator = torch.Generator(run.device).manual_seed(int(random.integers(2**62)))
        loss, figures = loss_of(random, generator, progress)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimizer in optimizers:
            optimizer.step()
        trained.zero_grad()
        ema.step(parameters)
        if step % 50 == 0:
            bar.set_postfix({key: f"{float(value.detach()):.3f}" for key, value in figures.items()})
        if time.time() - saved_at > SAVE_SECONDS or step + 1 == plan["steps"]:
            saved_at = time.time()
            seconds = spent + saved_at - began
            save_state(path, trained, ema, optimizers, step + 1, seconds)
    ema.copy_to(parameters)
    return (spent + time.time() - began) / 60


def save_state(path, trained, ema, optimizers, step, seconds):
    """Write the training state atomically."""
    state = dict(
        weights=trained.state_dict(),
        ema=ema.state_dict(),
        step=step,
        optimizers=[optimizer.state_dict() for optimizer in optimizers],
        seconds=seconds,
    )
    torch.save(state, path.with_suffix(".partial"))
    path.with_suffix(".partial").rename(path)


def load_state(path, trained, ema, optimizers, device):
    """Restore a training state; returns its step and the seconds that it took."""
    state = torch.load(path, weights_only=True, map_location=device)
    trained.load_state_dict(state["weights"])
    ema.load_state_dict(state["ema"])
    for optimizer, saved in zip(optimizers, state["optimizers"]):
        optimizer.load_state_dict(saved)
    return state["step"], state["seconds"]


def decayed(progress, decay):
    """Return the share of the learning rate that is left: a cosine, or all of it until the last share `decay`
    of the steps.

    In the second form the number of steps may be raised until the fall begins, and nothing before changes.
    """
    return 0.5 + 0.5 * math.cos(math.pi * progress) if decay is None else min(1.0, (1 - progress) / decay)


def make_optimizers(trained, plan):
    """Muon for the matrices of blocks and the kernels of an autoencoder where the plan has a rate for it;
    AdamW for the rest.
    """
    matrices, kernels, others = [], [], []
    for name, parameter in trained.named_parameters():
        if plan["muon_rate"] and "blocks." in name and parameter.ndim == 2:
            matrices.append(parameter)
        elif plan["muon_rate"] and is_kernel(name, parameter):
            kernels.append(parameter)
        elif parameter.requires_grad:
            others.append(parameter)
    optimizers = [torch.optim.AdamW(others, lr=plan["learning_rate"], betas=(0.9, 0.98), weight_decay=0.01)]
    if matrices:
        optimizers.append(torch.optim.Muon(matrices, lr=plan["muon_rate"], weight_decay=0.01))
    if kernels:
        optimizers.append(KernelMuon(kernels, lr=plan["muon_rate"], weight_decay=0.0))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
    return optimizers


def is_kernel(name, parameter):
    """Whether a parameter is a 3-D kernel that is trained as a matrix: not at the ends of a network, nor
    unused at one frame.
    """
    is_wide = parameter.ndim == 5 and min(parameter.flatten(1).shape) >= 16
    return is_wide and "patch_embedding" not in name and "time_conv" not in name


class KernelMuon(torch.optim.Muon):
    """Muon for convolutions: each kernel moves as a matrix of a row an output channel, which is a view of it.

    Without decay, for at one frame most taps of a kernel have no gradient and keep their values.
    """

    def __init__(self, kernels, **settings):
        self.kernels = kernels
        super().__init__([nn.Parameter(kernel.detach().flatten(1)) for kernel in kernels], **settings)

    def step(self, closure=None):
        for kernel, matrix in zip(self.kernels, self.param_groups[0]["params"]):
            matrix.grad = kernel.grad.flatten(1)
        return super().step(closure)


# ---- autoencoder -------------------------------------------------------------------------------------------


def train_autoencoder(run):
    """Images -> latents -> images. The mean of the latents is used, plus fixed noise that keeps the latent space
    smooth.

    At one frame only the last temporal taps run: the other taps and the time convolutions keep their initial
    values.
    """
    torch.manual_seed(SEED)
    network = vae.use_single_frame_path(AutoencoderKLWan(**run.recipe.autoencoder))
    batch_size = run.recipe.plan["autoencoder"]["batch_size"]

    def loss_of(random, generator, progress):
        scenes = [run.world.random_scene(random) for _ in range(batch_size)]
        drawn = np.stack([run.world.draw(scene, random) for scene in scenes])
        grounds = np.stack([run.world.ground(scene) for scene in scenes])
        rows, columns = choose_crop(random, run.recipe, progress)
        pixels, ground = (vae.to_pixels(each[:, rows, columns]).to(run.device) for each in (drawn, grounds))
        weight = 1 + 3 * ((pixels - ground).abs().amax(1, keepdim=True) > 0.1).float()
        mean = network.encode(pixels.unsqueeze(2)).latent_dist.mode()
        raw_latents = mean + 0.1 * torch.randn(mean.shape, generator=generator, device=run.device)
        seen = network.decode(raw_latents).sample.squeeze(2)
        error, sides = seen - pixels, pixels.shape[-1] - 1
        edges = sum((weight.narrow(dim, 1, sides) * error.diff(dim=dim).abs()).mean() for dim in (2, 3))
        reconstruction = (weight * (error.abs() + error.square())).mean() + edges
        return reconstruction + 1e-3 * mean.square().mean(), {"loss": reconstruction}

    # The clamp at the end of decode() stops gradients outside -1..1; the palette stays inside it.
    minutes = fit("autoencoder", network, loss_of, run)
    mean, std = latent_statistics(network.eval().requires_grad_(False), run)
    network.register_to_config(latents_mean=mean, latents_std=std)
    nn.Module.to(network, run.recipe.dtype).save_pretrained(run.folder / "vae")  # diffusers' own to() warns
    drawn, scenes = some_images(run.world, seed=1, count=1000)
    seen = round_trip(vae.load_autoencoder(run.folder, run.device), drawn)
    error = np.mean((seen.astype(np.float32) - drawn) ** 2)
    return {
        "minutes": minutes,
        "psnr_db": float(10 * np.log10(255**2 / error)),
        **judged(run.world, seen, scenes),
        "parameters": network.num_parameters(),
    }


def choose_crop(random, recipe, progress):
    """Return the rows and columns, slices, that the autoencoder sees: crops at first, for they take a share
    of the time.
    """
    size, share = recipe.cropped
    if progress >= share:
        return slice(None), slice(None)
    return (
        slice(first, first + size) for first in random.integers(recipe.world.IMAGE_SIZE - size + 1, size=2)
    )


def latent_statistics(network, run):
    drawn, _ = some_images(run.world, seed=2, count=2000)
    latents = torch.cat(
        [
            network.encode(vae.to_pixels(chunk).to(run.device).unsqueeze(2)).latent_dist.mode()
            for chunk in np.array_split(drawn, 20)
        ]
    )
    return latents.mean((0, 2, 3, 4)).tolist(), latents.std((0, 2, 3, 4)).tolist()


def round_trip(network, drawn):
    return np.concatenate(
        [
            vae.to_images(
                vae.decode_latents(
                    network, vae.encode_images(network, vae.to_pixels(chunk).to(network.device))
                )
            )
            for chunk in np.array_split(drawn, 20)
        ]
    )


def some_images(world, seed, count):
    scenes = world.scenes(seed, count)
    random = np.random.default_rng([seed, 1])
    return np.stack([world.draw(scene, random) for scene in scenes]), scenes


def judged(world, seen, scenes):
    """Return the mean of everything that the world's judge has a figure for."""
    verdicts = [world.judge(image, scene) for image, scene in zip(seen, scenes)]
    return {name: float(np.mean([verdict[name] for verdict in verdicts])) for name in verdicts[0]}


# ---- text --------------------------------------------------------------------------------------------------


def train_text(run):
    """Train a word-level tokenizer and a UMT5 in which every word of an object encodes all facts of that object.

    Trained alone this takes seconds; inside the diffusion loss it takes hours.
    """
    recipe = run.recipe
    tokenizer = make_tokenizer(recipe)
    tokenizer.save_pretrained(run.folder / "tokenizer")
    torch.manual_seed(SEED)
    encoder = UMT5EncoderModel(UMT5Config(vocab_size=len(tokenizer), **recipe.text))
    heads = nn.ModuleDict(
        {name: nn.Linear(recipe.text["d_model"], len(values)) for name, values in recipe.facts.items()}
    )
    trained = nn.ModuleDict({"encoder": encoder, "heads": heads})

    def loss_of(random, generator, progress):
        scenes = training_scenes(run.world, random, recipe.plan["text"]["batch_size"])
        captions = [run.world.caption(scene, random) for scene in scenes]
        tokens = tokenizer(captions, padding=True, return_tensors="pt").to(run.device)
        states = encoder(tokens.input_ids, tokens.attention_mask).last_hidden_state
        rows, columns, facts = spoken_words(captions, recipe)
        words = states[rows, columns]
        losses, right = [], torch.ones(len(facts), dtype=torch.bool, device=run.device)
        for name, values in recipe.facts.items():
            answer = torch.tensor([values.index(fact[name]) for fact in facts], device=run.device)
            guess = heads[name](words)
            losses.append(F.cross_entropy(guess, answer))
            right &= guess.argmax(-1) == answer
        return sum(losses), {"loss": sum(losses), "right": right.float().mean()}

    minutes = fit("text", trained, loss_of, run)
    encoder.eval().to(recipe.dtype).save_pretrained(run.folder / "text_encoder")
    encoder.float()
    with torch.no_grad():
        figures = [
            float(loss_of(np.random.default_rng([SEED, 99, i]), None, 1.0)[1]["right"]) for i in range(10)
        ]
    return {
        "minutes": minutes,
        "words_that_know_their_object": float(np.mean(figures)),
        "parameters": encoder.num_parameters(),
    }


def make_tokenizer(recipe):
    captions = [
        caption
        for scene in recipe.world.scenes(SEED, recipe.num_worded)
        for caption in recipe.world.all_captions(scene)
    ]
    captions += recipe.world.captions(
        SEED, recipe.num_worded
    )  # without its style "a flat octopus" is "an octopus"
    words = sorted({word for caption in captions for word in caption.replace(",", " , ").split()})
    vocabulary = {word: index for index, word in enumerate(["<pad>", "</s>", "<unk>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=512,
    )


def spoken_words(captions, recipe):
    """Return rows, columns and facts: one entry for each word of an object in each caption."""
    rows, columns, facts = [], [], []
    for row, caption in enumerate(captions):
        words = caption.replace(",", " , ").split()
        for phrase, known in recipe.spoken(recipe.world.read_caption(caption)):
            start = next(i for i in range(len(words)) if words[i : i + len(phrase)] == phrase)
            rows += [row] * len(phrase)
            columns += range(start, start + len(phrase))
            facts += [known] * len(phrase)
    return rows, columns, facts


def training_scenes(world, random, count):
    drawn = (world.random_scene(random) for _ in iter(int, 1))
    wanted = (scene for scene in drawn if not world.is_held_out(scene))
    return [next(wanted) for _ in range(count)]


# ---- experts -----------------------------------------------------------------------------------------------


def train_experts(run):
    """Train one network for every noise level, then a copy for each side of the boundary; the text encoder is
    frozen.
    """
    recipe = run.recipe
    tokenizer, encoder = text.load_text_encoder(run.folder, run.device, torch.float32)
    scenes = captioned_scenes(vae.load_autoencoder(run.folder, run.device), tokenizer, run)
    empty = tokenizer("", return_tensors="pt").input_ids.to(run.device)  # (1, 1)
    trained = make_trained(recipe)
    velocity_of = compiled_velocity(trained["network"]) if recipe.is_compiled else one_frame_velocity

    def loss_between(lowest, highest, batch_size):
        def loss_of(random, generator, progress):
            index, way = (
                torch.from_numpy(random.integers(size, size=batch_size)).to(run.device)
                for size in scenes["ids"].shape[:2]
            )
            is_dropped = torch.from_numpy(random.random((batch_size, 1)) < PROMPT_DROPOUT).to(run.device)
            ids = scenes["ids"][index, way].long()
            ids = torch.where(
                is_dropped, F.pad(empty, (0, ids.shape[1] - 1), value=tokenizer.pad_token_id), ids
            )
            is_word = ids != tokenizer.pad_token_id
            with torch.no_grad():
                prompt_tokens = pack_states(encoder(ids, is_word.long()).last_hidden_state, is_word.sum(1))
            clean = scenes["latents"][index].float()
            noise = torch.randn(clean.shape, generator=generator, device=run.device)
            uniform = torch.rand(batch_size, generator=generator, device=run.device)
            uniform = (uniform + torch.arange(batch_size, device=run.device)) / batch_size
            level = flow.shift_noise_level(lowest + (highest - lowest) * uniform, SHIFT)
            velocity, (early, middle) = velocity_of(
                trained["network"],
                flow.add_noise(clean, noise, level),
                schedule.TIMESTEPS * level,
                prompt_tokens.tokens,
                prompt_tokens.logit_bias,
                feature_blocks=(0, recipe.expert["num_layers"] // 2),
            )
            error = (velocity - (noise - clean)).square().mean()
            position = torch.arange(GRID**2, device=run.device).repeat(batch_size)
            where = F.cross_entropy(trained["where"](early).flatten(0, 1), position)
            guesses = trained["what"](middle).flatten(0, 1).split(list(recipe.labels.values()), -1)
            answers = (
                scenes["labels"][index]
                .long()
                .masked_fill(is_dropped.unsqueeze(2), IGNORED)
                .flatten(0, 1)
                .unbind(-1)
            )
            what = sum(
                F.cross_entropy(guess, answer, ignore_index=IGNORED)
                for guess, answer in zip(guesses, answers)
            )
            help_weight = recipe.help_weight * (1 - progress)
            return error + help_weight * (where + what), {"velocity": error, "where": where, "what": what}

        return loss_of

    figures = {}
    turn = BOUNDARY / (SHIFT - (SHIFT - 1) * BOUNDARY)  # the boundary before the shift
    spans = {"shared": (0.0, 1.0), "high": (turn, 1.0), "low": (0.0, turn)}
    for stage, (lowest, highest) in spans.items():
        if stage != "shared":
            trained["network"].load_state_dict(load_file(run.work / "shared.safetensors"))
        minutes = fit(stage, trained, loss_between(lowest, highest, recipe.plan[stage]["batch_size"]), run)
        figures[f"minutes_{stage}"] = minutes
        save_file(trained["network"].state_dict(), run.work / f"{stage}.safetensors")
    for stage, name in (("high", "transformer"), ("low", "transformer_2")):
        expert = WanTransformer3DModel(**recipe.expert)
        expert.load_state_dict(load_file(run.work / f"{stage}.safetensors"))
        nn.Module.to(expert, recipe.dtype).save_pretrained(run.folder / name)
    figures["parameters_each"] = expert.num_parameters()
    return figures


def compiled_velocity(network):
    """Return one_frame_velocity, compiled, with matrix products in bfloat16; weights and the residual stream stay
    float32.

    Against a step of float32 without it, on a CPU with bfloat16 instructions: 1.9 times as fast. Attention is
    not fused: of sixteen tokens, the fused one takes a third of a step to go back on a CPU.
    """
    network.patch_embedding.register_forward_hook(lambda module, inputs, states: states.float())
    compiled = torch.compile(one_frame_velocity)

    def velocity_of(network, latents, *inputs, **options):
        with sdpa_kernel(SDPBackend.MATH), torch.autocast(latents.device.type, torch.bfloat16):
            velocity, features = compiled(network, latents, *inputs, **options)
        return velocity.float(), [states.float() for states in features]

    return velocity_of


def make_trained(recipe):
    """Return an expert, every block of which takes the text's logit bias, and the heads that help its
    training.
    """
    torch.manual_seed(SEED)
    network = WanTransformer3DModel(**recipe.expert)
    config = network.config
    width = config.num_attention_heads * config.attention_head_dim
    network.blocks = nn.ModuleList(
        OneFrameBlock(
            width,
            config.ffn_dim,
            config.num_attention_heads,
            config.qk_norm,
            config.cross_attn_norm,
            config.eps,
        )
        for _ in range(config.num_layers)
    )
    nn.init.zeros_(network.proj_out.weight)
    nn.init.zeros_(network.proj_out.bias)
    return nn.ModuleDict(
        {
            "network": network,
            "where": nn.Linear(width, GRID * GRID),
            "what": nn.Linear(width, sum(recipe.labels.values())),
        }
    )


@torch.no_grad()
def captioned_scenes(network, tokenizer, run):
    """Return all scenes that the experts train on, on the device: every shard is made once, into the work
    folder.

    latents (scenes, C, H, W) float16; ids (scenes, captions, L) int16, padded; labels (scenes, N, labels)
    uint8.
    """
    count = min(SHARD, run.recipe.num_scenes)
    shards = [run.work / f"scenes-{shard:02d}.safetensors" for shard in range(run.recipe.num_scenes // count)]
    missing = [shard for shard, path in enumerate(shards) if not path.exists()]
    with multiprocessing.get_context("spawn").Pool(run.threads) as pool:
        made = pool.imap(partial(make_scenes, run.recipe.name, count), missing)
        for shard, (images, captions, labels) in zip(tqdm(missing, desc="scenes", mininterval=5), made):
            latents = [
                vae.encode_images(network, vae.to_pixels(part).to(run.device)).half().cpu()
                for part in np.array_split(images, math.ceil(count / 100))
            ]
            ids = tokenizer(
                [caption for each in captions for caption in each],
                padding="max_length",
                max_length=TOKENS,
                return_tensors="pt",
            ).input_ids.short()
            tensors = {
                "latents": torch.cat(latents).contiguous(),
                "ids": ids.view(count, CAPTIONS, TOKENS),
                "labels": labels,
            }
            save_file(tensors, shards[shard].with_suffix(".partial"))
            shards[shard].with_suffix(".partial").rename(shards[shard])
    read = [load_file(path) for path in shards]
    scenes = {name: torch.cat([tensors[name] for tensors in read]) for name in read[0]}
    longest = int((scenes["ids"] != tokenizer.pad_token_id).sum(-1).max())
    scenes["ids"] = scenes["ids"][..., :longest].contiguous()
    return {name: tensor.to(run.device) for name, tensor in scenes.items()}


def make_scenes(name, count, shard):
    """Return a shard of `count` scenes: images (scenes, H, W, 3) uint8, captions of each, labels (scenes,
    N, labels) uint8.
    """
    recipe, random = RECIPES[name], np.random.default_rng([SEED, shard])
    scenes = training_scenes(recipe.world, random, count)
    return (
        np.stack([recipe.world.draw(scene, random) for scene in scenes]),
        [[recipe.world.caption(scene, random) for _ in range(CAPTIONS)] for scene in scenes],
        torch.from_numpy(np.stack([recipe.layout(scene) for scene in scenes])).byte(),
    )


# ---- the whole checkpoint ----------------------------------------------------------------------------------


def assemble(run):
    """Write the files that make the components a WanPipeline, then judge its images of held-out captions."""
    flow.make_scheduler(SHIFT).save_pretrained(run.folder / "scheduler")
    parts = {
        "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
        "text_encoder": ["transformers", "UMT5EncoderModel"],
        "vae": ["diffusers", "AutoencoderKLWan"],
        "scheduler": ["diffusers", "UniPCMultistepScheduler"],
        "transformer": ["diffusers", "WanTransformer3DModel"],
        "transformer_2": ["diffusers", "WanTransformer3DModel"],
    }
    index = {
        "_class_name": "WanPipeline",
        "_diffusers_version": diffusers.__version__,
        "boundary_ratio": BOUNDARY,
        "expand_timesteps": False,
        **parts,
    }
    (run.folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    if run.recipe.notice:
        shutil.copy(run.recipe.notice, run.folder)
    return judge_pipeline(run)


def judge_pipeline(run):
    """Return the judge's figures of the finished teacher, for each of the recipe's settings."""
    pipeline = WanPipeline.from_pretrained(run.folder, dtype=torch.float32).to(run.device)
    pipeline.set_progress_bar_config(disable=True)

    def generate(captions, steps, is_guided):
        images, guidance = [], run.recipe.guidance if is_guided else dict.fromkeys(run.recipe.guidance, 1.0)
        for start in range(0, len(captions), 50):
            noise = flow.seeded_noise(
                (16, 1, 8, 8), range(start, start + len(captions[start : start + 50]))
            ).to(run.device)
            frames = pipeline(
                captions[start : start + 50],
                height=64,
                width=64,
                num_frames=1,
                latents=noise,
                num_inference_steps=steps,
                guidance_scale=guidance["high"],
                guidance_scale_2=guidance["low"],
                output_type="np",
            ).frames
            images.append((frames[:, 0] * 255).round().astype(np.uint8))
        return np.concatenate(images)

    first, *others = (
        (
            f"{steps} steps, {'guided' if is_guided else 'unguided'}",
            accuracy(partial(generate, steps=steps, is_guided=is_guided), run.world, 400),
        )
        for steps, is_guided in run.recipe.judged
    )
    return {"drawn": first[0], **first[1], **dict(others)}


def accuracy(generate, world, count):
    """Return the judge's figures for `count` held-out captions of one object, and for as many of two."""
    figures = {}
    for name, objects in (("one", 1), ("two", 2)):
        found = prompt_accuracy(
            generate, world.captions(SEED, count, held_out=True, num_objects=objects), world
        )
        figures |= {f"{name}_{key}": value for key, value in found.items() if not key.startswith("accuracy_")}
    return figures


# ---- the network before it is finished ---------------------------------------------------------------------


@torch.no_grad()
def judge_shared(run, count):
    """Print figures of the network that all noise levels share, from the EMA weights of its last save."""
    state = torch.load(run.work / "shared.pt", weights_only=True, map_location=run.device)
    trained = make_trained(run.recipe).to(run.device)
    for parameter, average in zip(trained.parameters(), state["ema"]["shadow_params"]):
        parameter.copy_(average)
    generate = make_generator(run, trained["network"])
    print(
        f"step {state['step']}, {state['step'] * run.recipe.plan['shared']['batch_size']} samples", flush=True
    )
    for guidance, steps in ((run.recipe.guidance["low"], 20), (1.0, 20), (run.recipe.guidance["low"], 4)):
        figures = accuracy(partial(generate, guidance=guidance, steps=steps), run.world, count)
        print(f"guidance {guidance:g}, {steps} steps:", figures, flush=True)


def make_generator(run, network):
    """Return a function that generates images (B, 64, 64, 3) uint8 of captions, with one network for every noise
    level.
    """
    tokenizer, encoder = text.load_text_encoder(run.folder, run.device, torch.float32)
    autoencoder = vae.load_autoencoder(run.folder, run.device)
    empty = text.encode_prompts(tokenizer, encoder, [""])[0]

    def generate(captions, guidance, steps):
        embeddings, images = text.encode_prompts(tokenizer, encoder, captions), []
        for start in range(0, len(captions), 100):
            part = embeddings[start : start + 100]
            noise = flow.seeded_noise((16, 8, 8), range(start, start + len(part))).to(run.device)
            velocity = guided_velocity(network, part, empty, guidance)
            latents = flow.sample(velocity, noise, flow.make_scheduler(SHIFT), steps)
            images.append(vae.to_images(vae.decode_latents(autoencoder, latents)))
        return np.concatenate(images)

    return generate


def guided_velocity(network, embeddings, empty, guidance):
    """Return a function of (latents, timestep): the velocity, moved away from that of an empty prompt."""
    packed = pack_text([*embeddings, *([empty] * len(embeddings))])

    def velocity_of(latents, timestep):
        latents, timestep = torch.cat([latents] * 2), torch.cat([timestep] * 2)
        velocity, _ = one_frame_velocity(network, latents, timestep, packed.tokens, packed.logit_bias)
        wanted, unwanted = velocity.chunk(2)
        return unwanted + guidance * (wanted - unwanted)

    return velocity_of


# ---- main --------------------------------------------------------------------------------------------------

STAGES = {
    "autoencoder": train_autoencoder,
    "text": train_text,
    "experts": train_experts,
    "pipeline": assemble,
}


def missed_gates(figures, gates):
    """Return a message for each figure that misses its gate: an upper bound after a minus sign, else a lower
    bound.
    """
    return [
        f"{name.strip('-')} {figures[name.strip('-')]:.4g}, expected at "
        f"{'most' if name[0] == '-' else 'least'} {bound:g}"
        for name, bound in gates.items()
        if (figures[name.strip("-")] > bound if name[0] == "-" else figures[name] < bound)
    ]


def read_record(run):
    path = run.folder / "training.json"
    return json.loads(path.read_text()) if path.exists() else {}


def write_record(run, stage, figures, options):
    """Add a stage's figures to what is recorded now: another stage may have ended meanwhile."""
    record = read_record(run)
    record.setdefault("figures", {})[stage] = figures
    record.update(
        seed=SEED,
        world=run.recipe.name,
        resolution=run.world.IMAGE_SIZE,
        shift=SHIFT,
        boundary=BOUNDARY,
        guidance=run.recipe.guidance,
        plan=run.recipe.plan,
        threads=options.threads,
        device=options.device,
        torch=torch.__version__,
    )
    (run.folder / "training.json").write_text(json.dumps(record, indent=2) + "\n")


def read_options():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--world", choices=tuple(RECIPES), default="shapes")
    parser.add_argument("--output_dir", type=Path, help="tiny_teacher for shapes, emoji_teacher for emoji")
    parser.add_argument(
        "--work_dir", type=Path, help="resumable state, latents; a folder in outputs/ by default"
    )
    parser.add_argument("--stages", nargs="+", choices=tuple(STAGES))
    parser.add_argument(
        "--threads", type=int, default=1, help="one thread is the most efficient at this size"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--judge", type=int, metavar="COUNT", help="only judge the shared network of the last save"
    )
    return parser, parser.parse_args()


def main():
    parser, options = read_options()
    torch.set_num_threads(options.threads)
    torch.set_float32_matmul_precision("high")  # TF32 where the device has it
    folder = options.output_dir or Path(
        {"shapes": "tiny_teacher"}.get(options.world, f"{options.world}_teacher")
    )
    run = Run(
        RECIPES[options.world],
        folder,
        options.work_dir or Path("outputs") / f"{folder.name}_work",
        options.device,
        options.threads,
    )
    if options.judge:
        return judge_shared(run, options.judge)
    for place in (run.folder, run.work):
        place.mkdir(parents=True, exist_ok=True)
    for name, train in STAGES.items():
        if name not in (options.stages or STAGES.keys() - read_record(run).get("figures", {}).keys()):
            continue
        print(f"{name}: training into {run.folder}, resumable state in {run.work}", flush=True)
        figures = train(run)
        print(name, figures, flush=True)
        write_record(run, name, figures, options)
        if missed := missed_gates(figures, run.recipe.gates.get(name, {})):
            parser.exit(
                1,
                f"train_tiny_teacher.py: {name}: {'; '.join(missed)}. Raise its steps in tools/recipes.py "
                f"and run "
                f"--stages {name} again, or continue with the later stages by --stages.\n",
            )


if __name__ == "__main__":
    main()
