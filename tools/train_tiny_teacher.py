"""Train a tiny teacher, a small but complete Wan2.2 checkpoint in the diffusers layout, on scenes drawn by rule.

    python tools/train_tiny_teacher.py                                # shapes, into ./tiny_teacher: about an hour on one core
    python tools/train_tiny_teacher.py --stages experts               # one stage again
    python tools/train_tiny_teacher.py --world emoji --threads 2      # emoji, into ./emoji_teacher; the experts want a GPU
    python tools/train_tiny_teacher.py --world emoji --stages experts --device cuda --threads 16      # minutes
    python tools/train_tiny_teacher.py --world emoji --judge 100      # judge the last save, with 100 captions per kind

Stages: autoencoder -> text -> experts -> pipeline. Each prints its figures. A finished stage is skipped, and after
a kill the same command resumes from at most a minute earlier. A stage whose figures miss the gates of its recipe
ends the run. Settings, figures and minutes go to training.json beside the weights. Auxiliary heads (the position of
a token, the object in it, the object of a word) are discarded after training, so that the networks are stock.

Legend: B batch, C channels, H W height and width, N image tokens, L text length.
"""

import argparse
import json
import math
import multiprocessing
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from tools.recipes import GRID, RECIPES, Recipe  # noqa: E402
from wanlite import flow, schedule  # noqa: E402
from wanlite.data import autoencoder as vae  # noqa: E402
from wanlite.data import text_encoder as text  # noqa: E402
from wanlite.network import OneFrameBlock, TextTokens, one_frame_velocity, pack_states, pack_text  # noqa: E402
from wanlite.teacher.checkpoint import open_teacher_files  # noqa: E402
from wanlite.teacher.model import Teacher  # noqa: E402
from wanlite.training.metrics import prompt_accuracy  # noqa: E402

SEED = 22
SHIFT = 3.0
BOUNDARY = 0.875  # noise level from which the high-noise expert is used
PROMPT_DROPOUT = 0.1
CAPTIONS = 8  # of each scene
TOKENS = 24  # no caption of a world is longer
IGNORED = -100  # a label that no loss counts
EXPERT_FOLDERS = {"high": "transformer", "low": "transformer_2"}

# (random numbers, generator on the device, progress 0..1) -> loss, figures
LossOf = Callable[[np.random.Generator, torch.Generator, float], tuple[Tensor, dict[str, Tensor]]]


@dataclass(frozen=True)
class Run:
    """One command: a recipe, its folders, and its device."""

    recipe: Recipe
    folder: Path  # the checkpoint
    work: Path  # resumable state, latents
    device: str
    threads: int
    save_seconds: float = 60  # between two saves of a training state
    shard_size: int = 10_000  # scenes made between two saves

    @property
    def world(self) -> Any:
        return self.recipe.world


# ---- one loop for every stage ------------------------------------------------------------------------------


def fit(name: str, trained: nn.Module, loss_of: LossOf, run: Run) -> float:
    """Train the modules in `trained` and leave their EMA weights in place; returns the minutes spent.

    The random numbers of a step are a function of its number, so that a killed run resumes to the same end.
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
        set_learning_rates(optimizers, min(1.0, (step + 1) / 100) * decayed(progress, plan["decay"]))
        random = np.random.default_rng([SEED, sum(name.encode()), step])
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
        if time.time() - saved_at > run.save_seconds or step + 1 == plan["steps"]:
            saved_at = time.time()
            save_state(path, trained, ema, optimizers, step + 1, spent + saved_at - began)
    ema.copy_to(parameters)
    return (spent + time.time() - began) / 60


def set_learning_rates(optimizers: Iterable[torch.optim.Optimizer], scale: float) -> None:
    """Set every learning rate to its initial value times `scale`."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * scale


def save_state(
    path: Path,
    trained: nn.Module,
    ema: EMAModel,
    optimizers: Sequence[torch.optim.Optimizer],
    step: int,
    seconds: float,
) -> None:
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


def load_state(
    path: Path, trained: nn.Module, ema: EMAModel, optimizers: Sequence[torch.optim.Optimizer], device: str
) -> tuple[int, float]:
    """Restore a training state; returns its step and the seconds of training until then."""
    state = torch.load(path, weights_only=True, map_location=device)
    trained.load_state_dict(state["weights"])
    ema.load_state_dict(state["ema"])
    for optimizer, saved in zip(optimizers, state["optimizers"]):
        optimizer.load_state_dict(saved)
    return state["step"], state["seconds"]


def decayed(progress: float, decay: float | None) -> float:
    """Return the share of the learning rate at `progress`: a cosine, or 1 and a linear fall in the last share `decay`.

    With `decay`, the number of steps can be raised until the fall begins without a change of the earlier steps.
    """
    return 0.5 + 0.5 * math.cos(math.pi * progress) if decay is None else min(1.0, (1 - progress) / decay)


def make_optimizers(trained: nn.Module, plan: Mapping[str, Any]) -> list[torch.optim.Optimizer]:
    """Return AdamW and, if the plan has a rate for it, Muon for the matrices of blocks and the autoencoder's kernels."""
    matrices: list[Tensor] = []
    kernels: list[Tensor] = []
    others: list[Tensor] = []
    for name, parameter in trained.named_parameters():
        if plan["muon_rate"] and "blocks." in name and parameter.ndim == 2:
            matrices.append(parameter)
        elif plan["muon_rate"] and is_kernel(name, parameter):
            kernels.append(parameter)
        elif parameter.requires_grad:
            others.append(parameter)
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(others, lr=plan["learning_rate"], betas=(0.9, 0.98), weight_decay=0.01)
    ]
    if matrices:
        optimizers.append(torch.optim.Muon(matrices, lr=plan["muon_rate"], weight_decay=0.01))
    if kernels:
        optimizers.append(KernelMuon(kernels, lr=plan["muon_rate"], weight_decay=0.0))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
    return optimizers


def is_kernel(name: str, parameter: Tensor) -> bool:
    """Whether a parameter is a wide 3-D kernel that one frame uses, which is trained as a matrix."""
    is_wide = parameter.ndim == 5 and min(parameter.flatten(1).shape) >= 16
    return is_wide and "patch_embedding" not in name and "time_conv" not in name


class KernelMuon(torch.optim.Muon):
    """Muon for convolutions: each kernel is updated as a matrix with one row per output channel, a view of it.

    Use it without weight decay: at one frame, most taps of a kernel have no gradient and keep their values.
    """

    def __init__(self, kernels: Sequence[Tensor], **settings: Any):
        self.kernels = kernels
        super().__init__([nn.Parameter(kernel.detach().flatten(1)) for kernel in kernels], **settings)

    def step(self, closure: Any = None) -> Any:
        for kernel, matrix in zip(self.kernels, self.param_groups[0]["params"]):
            matrix.grad = kernel.grad.flatten(1)
        return super().step(closure)


# ---- autoencoder -------------------------------------------------------------------------------------------


def train_autoencoder(run: Run) -> dict[str, Any]:
    """Train images -> latents -> images, with fixed noise on the latents' mean that keeps the latent space smooth.

    At one frame only the last temporal taps run. The other taps and the time convolutions keep their initial
    values.
    """
    torch.manual_seed(SEED)
    network = vae.use_single_frame_path(AutoencoderKLWan(**run.recipe.autoencoder))

    def loss_of(random, generator, progress):
        pixels, weight = weighted_images(run, random, progress)
        mean = network.encode(pixels.unsqueeze(2)).latent_dist.mode()
        raw_latents = mean + 0.1 * torch.randn(mean.shape, generator=generator, device=run.device)
        reconstruction = reconstruction_loss(network.decode(raw_latents).sample.squeeze(2), pixels, weight)
        return reconstruction + 1e-3 * mean.square().mean(), {"loss": reconstruction}

    # The clamp at the end of decode() stops gradients outside -1..1; the palette stays inside it.
    minutes = fit("autoencoder", network, loss_of, run)
    mean, std = latent_statistics(network.eval().requires_grad_(False), run)
    network.register_to_config(latents_mean=mean, latents_std=std)
    nn.Module.to(network, run.recipe.dtype).save_pretrained(run.folder / "vae")  # diffusers' own to() warns
    drawn, scenes = some_images(run.world, seed=1, count=1000)
    decoded = round_trip(vae.load_autoencoder(run.folder, run.device), drawn)
    error = np.mean((decoded.astype(np.float32) - drawn) ** 2)
    return {
        "minutes": minutes,
        "psnr_db": float(10 * np.log10(255**2 / error)),
        **judged(run.world, decoded, scenes),
        "parameters": network.num_parameters(),
    }


def weighted_images(run: Run, random: np.random.Generator, progress: float) -> tuple[Tensor, Tensor]:
    """Return a batch of pixels (B, 3, H, W), and their weights (B, 1, H, W): 4 on objects, 1 on the background."""
    batch_size = run.recipe.plan["autoencoder"]["batch_size"]
    scenes = [run.world.random_scene(random) for _ in range(batch_size)]
    drawn = np.stack([run.world.draw(scene, random) for scene in scenes])
    grounds = np.stack([run.world.ground(scene) for scene in scenes])
    rows, columns = choose_crop(random, run.recipe, progress)
    pixels, ground = (vae.to_pixels(each[:, rows, columns]).to(run.device) for each in (drawn, grounds))
    return pixels, 1 + 3 * ((pixels - ground).abs().amax(1, keepdim=True) > 0.1).float()


def reconstruction_loss(decoded: Tensor, pixels: Tensor, weight: Tensor) -> Tensor:
    """Return the weighted L1 and squared errors of pixels, plus the L1 errors of their differences."""
    error, sides = decoded - pixels, pixels.shape[-1] - 1
    edges = sum((weight.narrow(dim, 1, sides) * error.diff(dim=dim).abs()).mean() for dim in (2, 3))
    return (weight * (error.abs() + error.square())).mean() + edges


def choose_crop(random: np.random.Generator, recipe: Recipe, progress: float) -> tuple[slice, slice]:
    """Return the rows and columns that the autoencoder trains on: crops at first, which take less time."""
    size, share = recipe.cropped
    if progress >= share:
        return slice(None), slice(None)
    top, left = random.integers(recipe.world.IMAGE_SIZE - size + 1, size=2)
    return slice(top, top + size), slice(left, left + size)


def latent_statistics(network: Any, run: Run) -> tuple[list[float], list[float]]:
    """Return the mean and the standard deviation of each latent channel."""
    drawn, _ = some_images(run.world, seed=2, count=2000)
    latents = torch.cat(
        [
            network.encode(vae.to_pixels(chunk).to(run.device).unsqueeze(2)).latent_dist.mode()
            for chunk in np.array_split(drawn, 20)
        ]
    )
    return latents.mean((0, 2, 3, 4)).tolist(), latents.std((0, 2, 3, 4)).tolist()


def round_trip(network: Any, images: np.ndarray) -> np.ndarray:
    """Return images (B, H, W, 3) uint8 after encoding and decoding."""
    decoded = []
    for chunk in np.array_split(images, 20):
        latents = vae.encode_images(network, vae.to_pixels(chunk).to(network.device))
        decoded.append(vae.to_images(vae.decode_latents(network, latents)))
    return np.concatenate(decoded)


def some_images(world: Any, seed: int, count: int) -> tuple[np.ndarray, list[Any]]:
    """Return images (B, H, W, 3) uint8 of random scenes, and the scenes."""
    scenes = world.scenes(seed, count)
    random = np.random.default_rng([seed, 1])
    return np.stack([world.draw(scene, random) for scene in scenes]), scenes


def judged(world: Any, images: np.ndarray, scenes: Sequence[Any]) -> dict[str, float]:
    """Return the means of the figures of the world's judge."""
    verdicts = [world.judge(image, scene) for image, scene in zip(images, scenes)]
    return {name: float(np.mean([verdict[name] for verdict in verdicts])) for name in verdicts[0]}


# ---- text --------------------------------------------------------------------------------------------------


def train_text(run: Run) -> dict[str, Any]:
    """Train a word-level tokenizer and a UMT5 in which every word of an object encodes all facts of that object.

    Training it alone takes seconds; within the diffusion loss it takes hours.
    """
    tokenizer = make_tokenizer(run.recipe)
    tokenizer.save_pretrained(run.folder / "tokenizer")
    trained = make_text_networks(run.recipe, len(tokenizer))
    encoder = trained["encoder"]

    def loss_of(random, generator, progress):
        scenes = training_scenes(run.world, random, run.recipe.plan["text"]["batch_size"])
        captions = [run.world.caption(scene, random) for scene in scenes]
        tokens = tokenizer(captions, padding=True, return_tensors="pt").to(run.device)
        hidden_states = encoder(tokens.input_ids, tokens.attention_mask).last_hidden_state
        rows, columns, facts = spoken_words(captions, run.recipe)
        return fact_loss(trained["heads"], hidden_states[rows, columns], facts, run.recipe.facts)

    minutes = fit("text", trained, loss_of, run)
    encoder.eval().to(run.recipe.dtype).save_pretrained(run.folder / "text_encoder")
    encoder.float()
    with torch.no_grad():
        shares = [
            float(loss_of(np.random.default_rng([SEED, 99, i]), None, 1.0)[1]["right"]) for i in range(10)
        ]
    return {
        "minutes": minutes,
        "words_that_know_their_object": float(np.mean(shares)),
        "parameters": encoder.num_parameters(),
    }


def make_text_networks(recipe: Recipe, vocabulary_size: int) -> nn.ModuleDict:
    """Return the text encoder, and a head for each fact that a word predicts."""
    torch.manual_seed(SEED)
    encoder = UMT5EncoderModel(UMT5Config(vocab_size=vocabulary_size, **recipe.text))
    heads = {name: nn.Linear(recipe.text["d_model"], len(values)) for name, values in recipe.facts.items()}
    return nn.ModuleDict({"encoder": encoder, "heads": nn.ModuleDict(heads)})


def fact_loss(
    heads: nn.ModuleDict, words: Tensor, facts: Sequence[Mapping], values_of: Mapping[str, Sequence]
) -> tuple[Any, dict[str, Any]]:
    """Return the cross-entropy of all facts, and the share of words (W, D) whose facts are all predicted right."""
    losses, right = [], torch.ones(len(facts), dtype=torch.bool, device=words.device)
    for name, values in values_of.items():
        answer = torch.tensor([values.index(fact[name]) for fact in facts], device=words.device)
        guess = heads[name](words)
        losses.append(F.cross_entropy(guess, answer))
        right &= guess.argmax(-1) == answer
    return sum(losses), {"loss": sum(losses), "right": right.float().mean()}


def make_tokenizer(recipe: Recipe) -> PreTrainedTokenizerFast:
    """Return a word-level tokenizer of all words in the captions of a world."""
    captions = [
        caption
        for scene in recipe.world.scenes(SEED, recipe.num_worded)
        for caption in recipe.world.all_captions(scene)
    ]
    # "an" appears only where the style is left out: "a flat octopus" is "an octopus"
    captions += recipe.world.captions(SEED, recipe.num_worded)
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


def spoken_words(captions: Sequence[str], recipe: Recipe) -> tuple[list[int], list[int], list[dict]]:
    """Return the row, the column and the facts of each word of an object in the captions."""
    rows: list[int] = []
    columns: list[int] = []
    facts: list[dict] = []
    for row, caption in enumerate(captions):
        words = caption.replace(",", " , ").split()
        for phrase, its_facts in recipe.spoken(recipe.world.read_caption(caption)):
            start = next(i for i in range(len(words)) if words[i : i + len(phrase)] == phrase)
            rows += [row] * len(phrase)
            columns += range(start, start + len(phrase))
            facts += [its_facts] * len(phrase)
    return rows, columns, facts


def training_scenes(world: Any, random: np.random.Generator, count: int) -> list[Any]:
    """Return random scenes, none of which is held out."""
    drawn = (world.random_scene(random) for _ in iter(int, 1))
    wanted = (scene for scene in drawn if not world.is_held_out(scene))
    return [next(wanted) for _ in range(count)]


# ---- experts -----------------------------------------------------------------------------------------------


def train_experts(run: Run) -> dict[str, Any]:
    """Train one network for every noise level, then a copy for each side of the boundary, from frozen text."""
    recipe, figures = run.recipe, {}
    data = CaptionedLatents(run)
    trained = make_trained(recipe)
    velocity_of = compiled_velocity(trained["network"]) if recipe.is_compiled else one_frame_velocity
    turn = BOUNDARY / (SHIFT - (SHIFT - 1) * BOUNDARY)  # the boundary before the shift
    levels = {"shared": (0.0, 1.0), "high": (turn, 1.0), "low": (0.0, turn)}  # before the shift
    for stage, (lowest, highest) in levels.items():
        if stage != "shared":
            trained["network"].load_state_dict(load_file(run.work / "shared.safetensors"))
        batches = partial(data.batch, recipe.plan[stage]["batch_size"], lowest, highest)
        figures[f"minutes_{stage}"] = fit(
            stage, trained, expert_loss(trained, velocity_of, recipe, batches), run
        )
        save_file(trained["network"].state_dict(), run.work / f"{stage}.safetensors")
    for stage, folder in EXPERT_FOLDERS.items():
        expert = WanTransformer3DModel(**recipe.expert)
        expert.load_state_dict(load_file(run.work / f"{stage}.safetensors"))
        nn.Module.to(expert, recipe.dtype).save_pretrained(run.folder / folder)
    return figures | {"parameters_each": expert.num_parameters()}


@dataclass
class Batch:
    """Images with noise, and the answers of a training step."""

    text: TextTokens
    clean: Tensor  # (B, C, H, W)
    noise: Tensor  # (B, C, H, W)
    noise_level: Tensor  # (B,)
    labels: Tensor  # (B, N, labels), IGNORED where the prompt is dropped


class CaptionedLatents:
    """The data of the experts: latents and captions of all scenes, and the frozen text encoder."""

    def __init__(self, run: Run):
        self.device = run.device
        self.tokenizer, self.encoder = text.load_text_encoder(run.folder, run.device, torch.float32)
        self.scenes = captioned_scenes(vae.load_autoencoder(run.folder, run.device), self.tokenizer, run)
        self.empty = self.tokenizer("", return_tensors="pt").input_ids.to(run.device)  # (1, 1)

    def batch(
        self,
        size: int,
        lowest: float,
        highest: float,
        random: np.random.Generator,
        generator: torch.Generator,
    ) -> Batch:
        """Draw a batch with noise levels between `lowest` and `highest`, both before the shift."""
        index, caption = (
            torch.from_numpy(random.integers(count, size=size)).to(self.device)
            for count in self.scenes["ids"].shape[:2]
        )
        is_dropped = torch.from_numpy(random.random((size, 1)) < PROMPT_DROPOUT).to(self.device)
        prompts = self._encode(self.scenes["ids"][index, caption].long(), is_dropped)
        clean = self.scenes["latents"][index].float()
        noise = torch.randn(clean.shape, generator=generator, device=self.device)
        uniform = torch.rand(size, generator=generator, device=self.device)
        uniform = (uniform + torch.arange(size, device=self.device)) / size  # stratified
        noise_level = flow.shift_noise_level(lowest + (highest - lowest) * uniform, SHIFT)
        labels = self.scenes["labels"][index].long().masked_fill(is_dropped.unsqueeze(2), IGNORED)
        return Batch(prompts, clean, noise, noise_level, labels)

    @torch.no_grad()
    def _encode(self, ids, is_dropped):
        """Return the hidden states of captions (B, L), and of an empty prompt where they are dropped (B, 1)."""
        padding = self.tokenizer.pad_token_id
        empty = F.pad(self.empty, (0, ids.shape[1] - 1), value=padding)
        ids = torch.where(is_dropped, empty, ids)
        is_word = ids != padding
        return pack_states(self.encoder(ids, is_word.long()).last_hidden_state, is_word.sum(1))


def expert_loss(
    trained: nn.ModuleDict,
    velocity_of: Callable,
    recipe: Recipe,
    batch_of: Callable[[np.random.Generator, torch.Generator], Batch],
) -> LossOf:
    """Return the loss of an expert's step: the velocity error, plus auxiliary losses whose weight falls to zero."""
    feature_blocks = (0, recipe.expert["num_layers"] // 2)

    def loss_of(random, generator, progress):
        batch = batch_of(random, generator)
        velocity, (early, middle) = velocity_of(
            trained["network"],
            flow.add_noise(batch.clean, batch.noise, batch.noise_level),
            schedule.TIMESTEPS * batch.noise_level,
            batch.text.tokens,
            batch.text.logit_bias,
            feature_blocks=feature_blocks,
        )
        error = (velocity - (batch.noise - batch.clean)).square().mean()
        where = position_loss(trained["where"](early))
        what = label_loss(trained["what"](middle), batch.labels, list(recipe.labels.values()))
        help_weight = recipe.help_weight * (1 - progress)
        return error + help_weight * (where + what), {"velocity": error, "where": where, "what": what}

    return loss_of


def position_loss(logits: Tensor) -> Tensor:
    """Return the cross-entropy of the position of each image token; logits (B, N, N)."""
    position = torch.arange(GRID**2, device=logits.device).repeat(len(logits))
    return F.cross_entropy(logits.flatten(0, 1), position)


def label_loss(logits: Tensor, labels: Tensor, sizes: list[int]) -> Any:
    """Return the sum of the cross-entropies of each label; logits (B, N, sum of sizes), labels (B, N, labels)."""
    guesses = logits.flatten(0, 1).split(sizes, -1)
    answers = labels.flatten(0, 1).unbind(-1)
    return sum(
        F.cross_entropy(guess, answer, ignore_index=IGNORED) for guess, answer in zip(guesses, answers)
    )


def compiled_velocity(network: Any) -> Callable:
    """Return one_frame_velocity, compiled, with bfloat16 matrix products and a float32 residual stream.

    On a CPU with bfloat16 instructions, this makes a step 1.9 times as fast as in float32. Attention is not
    fused: for sixteen tokens, the backward pass of fused attention takes a third of a step on a CPU.
    """
    network.patch_embedding.register_forward_hook(lambda module, inputs, states: states.float())
    compiled = torch.compile(one_frame_velocity)

    def velocity_of(network, latents, *inputs, **options):
        with sdpa_kernel(SDPBackend.MATH), torch.autocast(latents.device.type, torch.bfloat16):
            velocity, features = compiled(network, latents, *inputs, **options)
        return velocity.float(), [states.float() for states in features]

    return velocity_of


def make_trained(recipe: Recipe) -> nn.ModuleDict:
    """Return an expert whose blocks take the text's logit bias, and the heads of its auxiliary losses."""
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
def captioned_scenes(network: Any, tokenizer: Any, run: Run) -> dict[str, Tensor]:
    """Return all scenes that the experts train on, on the device; each shard is made once, in the work folder.

    latents (scenes, C, H, W) float16; ids (scenes, captions, L) int16, padded; labels (scenes, N, labels)
    uint8.
    """
    count = min(run.shard_size, run.recipe.num_scenes)
    shards = [run.work / f"scenes-{shard:02d}.safetensors" for shard in range(run.recipe.num_scenes // count)]
    missing = [shard for shard, path in enumerate(shards) if not path.exists()]
    with multiprocessing.get_context("spawn").Pool(run.threads) as pool:
        made = pool.imap(partial(make_scenes, run.recipe.name, count), missing)
        for shard, (images, captions, labels) in zip(tqdm(missing, desc="scenes", mininterval=5), made):
            tensors = {
                "latents": encoded_images(network, images),
                "ids": tokenized(tokenizer, captions),
                "labels": labels,
            }
            save_file(tensors, shards[shard].with_suffix(".partial"))
            shards[shard].with_suffix(".partial").rename(shards[shard])
    read = [load_file(path) for path in shards]
    scenes = {name: torch.cat([tensors[name] for tensors in read]) for name in read[0]}
    longest = int((scenes["ids"] != tokenizer.pad_token_id).sum(-1).max())
    scenes["ids"] = scenes["ids"][..., :longest].contiguous()
    return {name: tensor.to(run.device) for name, tensor in scenes.items()}


def encoded_images(network: Any, images: np.ndarray) -> Tensor:
    """Return the latents (scenes, C, H, W) float16 of images, on the CPU."""
    latents = [
        vae.encode_images(network, vae.to_pixels(part).to(network.device)).half().cpu()
        for part in np.array_split(images, math.ceil(len(images) / 100))
    ]
    return torch.cat(latents).contiguous()


def tokenized(tokenizer: Any, captions: Sequence[Sequence[str]]) -> Tensor:
    """Return the token ids (scenes, captions, TOKENS) int16 of the captions of each scene."""
    ids = tokenizer(
        [caption for each in captions for caption in each],
        padding="max_length",
        max_length=TOKENS,
        return_tensors="pt",
    ).input_ids.short()
    return ids.view(len(captions), CAPTIONS, TOKENS)


def make_scenes(name: str, count: int, shard: int) -> tuple[np.ndarray, list[list[str]], Tensor]:
    """Return a shard of `count` scenes: images (scenes, H, W, 3) uint8, captions, labels (scenes, N, labels) uint8."""
    recipe, random = RECIPES[name], np.random.default_rng([SEED, shard])
    scenes = training_scenes(recipe.world, random, count)
    return (
        np.stack([recipe.world.draw(scene, random) for scene in scenes]),
        [[recipe.world.caption(scene, random) for _ in range(CAPTIONS)] for scene in scenes],
        torch.from_numpy(np.stack([recipe.layout(scene) for scene in scenes])).byte(),
    )


# ---- the whole checkpoint ----------------------------------------------------------------------------------


def assemble(run: Run) -> dict[str, Any]:
    """Write the files that turn the components into a WanPipeline, then judge its images of held-out captions."""
    flow.make_scheduler(SHIFT).save_pretrained(run.folder / "scheduler")
    components = {
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
        **components,
    }
    (run.folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    if run.recipe.notice:
        shutil.copy(run.recipe.notice, run.folder)
    return judge_teacher(run)


def judge_teacher(run: Run) -> dict[str, Any]:
    """Return the judge's figures of the finished teacher, for each of the recipe's settings.

    Images are those of a stock WanPipeline, without the time that padding of the text takes.
    """
    teacher = Teacher(open_teacher_files(run.folder), run.device)
    generate = make_generator(run, partial(velocity_of_teacher, teacher))
    first, *others = (
        (
            f"{steps} steps, {'guided' if is_guided else 'unguided'}",
            accuracy(
                partial(
                    generate,
                    guidance=tuple(run.recipe.guidance.values()) if is_guided else (1.0, 1.0),
                    steps=steps,
                ),
                run.world,
                400,
            ),
        )
        for steps, is_guided in run.recipe.judged
    )
    return {"drawn": first[0], **first[1], **dict(others)}


def velocity_of_teacher(
    teacher: Teacher, embeddings: Sequence[Tensor], empty: Tensor, guidance: tuple[float, float]
) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the velocity of both experts as a function of (latents, timestep); `guidance` is (high, low)."""
    prompts, negative = pack_text(embeddings), pack_text([empty] * len(embeddings))
    return lambda latents, timestep: teacher.velocity(latents, timestep, prompts, negative, *guidance)[0]


def accuracy(generate: Callable, world: Any, count: int) -> dict[str, Any]:
    """Return the judge's figures for `count` held-out captions of one object, and for `count` of two objects."""
    figures: dict[str, Any] = {}
    for name, objects in (("one", 1), ("two", 2)):
        found = prompt_accuracy(
            generate, world.captions(SEED, count, held_out=True, num_objects=objects), world
        )
        figures |= {f"{name}_{key}": value for key, value in found.items() if not key.startswith("accuracy_")}
    return figures


# ---- the network before it is finished ---------------------------------------------------------------------


@torch.no_grad()
def judge_shared(run: Run, count: int) -> None:
    """Print figures of the network that all noise levels share, from the EMA weights of its last save."""
    state = torch.load(run.work / "shared.pt", weights_only=True, map_location=run.device)
    trained = make_trained(run.recipe).to(run.device)
    for parameter, average in zip(trained.parameters(), state["ema"]["shadow_params"]):
        parameter.copy_(average)
    generate = make_generator(run, partial(guided_velocity, trained["network"]))
    print(
        f"step {state['step']}, {state['step'] * run.recipe.plan['shared']['batch_size']} samples", flush=True
    )
    for guidance, steps in ((run.recipe.guidance["low"], 20), (1.0, 20), (run.recipe.guidance["low"], 4)):
        figures = accuracy(partial(generate, guidance=guidance, steps=steps), run.world, count)
        print(f"guidance {guidance:g}, {steps} steps:", figures, flush=True)


def make_generator(run: Run, velocity_of: Callable) -> Callable:
    """Return a function that generates images (B, 64, 64, 3) uint8 of captions.

    `velocity_of(embeddings, empty, guidance)` returns a velocity as a function of (latents, timestep).
    """
    tokenizer, encoder = text.load_text_encoder(run.folder, run.device, torch.float32)
    autoencoder = vae.load_autoencoder(run.folder, run.device)
    empty = text.encode_prompts(tokenizer, encoder, [""])[0]

    @torch.no_grad()
    def generate(captions, guidance, steps):
        embeddings, images = text.encode_prompts(tokenizer, encoder, captions), []
        for start in range(0, len(captions), 100):
            chunk = embeddings[start : start + 100]
            noise = flow.seeded_noise((16, 8, 8), range(start, start + len(chunk))).to(run.device)
            velocity = velocity_of(chunk, empty, guidance)
            latents = flow.sample(velocity, noise, flow.make_scheduler(SHIFT), steps)
            images.append(vae.to_images(vae.decode_latents(autoencoder, latents)))
        return np.concatenate(images)

    return generate


def guided_velocity(
    network: Any, embeddings: Sequence[Tensor], empty: Tensor, guidance: float
) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the velocity, guided away from that of an empty prompt, as a function of (latents, timestep)."""
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


def missed_gates(figures: Mapping[str, float], gates: Mapping[str, float]) -> list[str]:
    """Return a message for each figure that misses its gate; a name with a minus sign has an upper bound."""
    return [
        f"{name.strip('-')} {figures[name.strip('-')]:.4g}, expected at "
        f"{'most' if name[0] == '-' else 'least'} {bound:g}"
        for name, bound in gates.items()
        if (figures[name.strip("-")] > bound if name[0] == "-" else figures[name] < bound)
    ]


def read_record(run: Run) -> dict[str, Any]:
    """Return training.json, {} if it does not exist."""
    path = run.folder / "training.json"
    return json.loads(path.read_text()) if path.exists() else {}


def write_record(run: Run, stage: str, figures: Mapping[str, Any], options: argparse.Namespace) -> None:
    """Add a stage's figures to training.json, read again because another stage may have ended meanwhile."""
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


def read_options() -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    """Return the parser and the options of the command line."""
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


def run_of(options: argparse.Namespace) -> Run:
    """Return the Run of a command, with the default folders of its world."""
    default_folder = {"shapes": "tiny_teacher"}.get(options.world, f"{options.world}_teacher")
    folder = options.output_dir or Path(default_folder)
    work = options.work_dir or Path("outputs") / f"{folder.name}_work"
    return Run(RECIPES[options.world], folder, work, options.device, options.threads)


def main() -> None:
    """Train the stages that are not finished, or judge the shared network."""
    parser, options = read_options()
    torch.set_num_threads(options.threads)
    torch.set_float32_matmul_precision("high")  # TF32 if the device has it
    run = run_of(options)
    if options.judge:
        return judge_shared(run, options.judge)
    for folder in (run.folder, run.work):
        folder.mkdir(parents=True, exist_ok=True)
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
                f"train_tiny_teacher.py: {name}: {'; '.join(missed)}. Raise its steps in tools/recipes.py and "
                f"run --stages {name} again, or continue with the later stages by --stages.\n",
            )


if __name__ == "__main__":
    main()
