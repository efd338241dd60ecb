"""Train the tiny teacher: a complete Wan2.2 checkpoint in the diffusers layout, only small, from scenes drawn by rule.

    python tools/train_tiny_teacher.py                    # every stage into ./tiny_teacher, about an hour on one core
    python tools/train_tiny_teacher.py --stages experts   # one stage again

Stages, each resumable and skipped when its part of the checkpoint is there: autoencoder -> text -> experts -> pipeline.
Settings, figures and minutes go to training.json beside the weights. Heads that help training (where is this token, what is
drawn here, which object does this word speak of) are thrown away: the networks that remain are stock.
"""

import argparse
import json
import math
import sys
import time
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
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from wanlite import autoencoder as pictures  # noqa: E402
from wanlite import flow, schedule, shapes, text  # noqa: E402
from wanlite.measure import prompt_accuracy  # noqa: E402
from wanlite.network import OneFrameBlock, one_frame_velocity, pack_text  # noqa: E402

SEED = 22
SHIFT = 3.0
BOUNDARY = 0.875                  # noise level from which on the high-noise expert is asked
GUIDANCE = {"high": 4.0, "low": 3.0}
PROMPT_DROPOUT = 0.1
NUM_SCENES = 60_000               # encoded once; each is captioned anew at every use

AUTOENCODER = dict(base_dim=16, z_dim=16, dim_mult=[1, 2, 2], num_res_blocks=1, temperal_downsample=[True, True],
                   is_residual=True, patch_size=2, in_channels=12, out_channels=12, scale_factor_spatial=8)
TEXT = dict(d_model=64, d_kv=16, d_ff=256, num_layers=2, num_heads=4, dropout_rate=0.0,
            relative_attention_num_buckets=32, relative_attention_max_distance=64)
EXPERT = dict(num_attention_heads=4, attention_head_dim=32, in_channels=16, out_channels=16, text_dim=64, freq_dim=256,
              ffn_dim=512, num_layers=4, rope_max_seq_len=64)
GRID = 4                          # image tokens along each side

# stage: steps, batch size, learning rate of AdamW, of Muon (None: AdamW alone), EMA decay
PLAN = {
    "autoencoder": dict(steps=3000, batch_size=24, learning_rate=2e-3, muon_rate=None, ema=0.995),
    "text": dict(steps=1500, batch_size=128, learning_rate=2e-3, muon_rate=None, ema=0.98),
    "shared": dict(steps=3000, batch_size=192, learning_rate=2e-3, muon_rate=0.02, ema=0.998),
    "high": dict(steps=900, batch_size=192, learning_rate=5e-4, muon_rate=0.005, ema=0.998),
    "low": dict(steps=900, batch_size=192, learning_rate=5e-4, muon_rate=0.005, ema=0.998),
}


# ---- one loop for every stage ----------------------------------------------------------------------------------------

def fit(name, trained, loss_of, work, plan):
    """Train the modules in `trained` and leave their EMA weights in place; returns the minutes spent.

    `loss_of(random, torch_generator, progress 0..1)` returns a loss and a dict of figures; its randomness is a function of the
    step, so that a run cut short goes on from its last minute to the same end.
    """
    parameters = [p for p in trained.parameters() if p.requires_grad]
    optimizers = make_optimizers(trained, plan)
    ema = EMAModel(parameters, decay=plan["ema"])
    path, first, spent = work / f"{name}.pt", 0, 0.0
    if path.exists():
        state = torch.load(path, weights_only=True)
        trained.load_state_dict(state["weights"])
        ema.load_state_dict(state["ema"])
        for optimizer, saved in zip(optimizers, state["optimizers"]):
            optimizer.load_state_dict(saved)
        first, spent = state["step"], state["seconds"]
    began = saved_at = time.time()
    bar = tqdm(range(first, plan["steps"]), initial=first, total=plan["steps"], desc=name, mininterval=5)
    for step in bar:
        progress = step / plan["steps"]
        scale = min(1.0, (step + 1) / 100) * (0.5 + 0.5 * math.cos(math.pi * progress))
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * scale
        stage_seed = [SEED, sum(name.encode()), step]
        random = np.random.default_rng(stage_seed)
        loss, figures = loss_of(random, torch.Generator().manual_seed(int(random.integers(2**62))), progress)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        ema.step(parameters)
        if step % 50 == 0:
            bar.set_postfix({key: f"{float(value.detach()):.3f}" for key, value in figures.items()})
        if time.time() - saved_at > 60 or step + 1 == plan["steps"]:
            saved_at = time.time()
            state = dict(weights=trained.state_dict(), ema=ema.state_dict(), step=step + 1,
                         optimizers=[optimizer.state_dict() for optimizer in optimizers],
                         seconds=spent + saved_at - began)
            torch.save(state, path.with_suffix(".partial"))
            path.with_suffix(".partial").rename(path)
    ema.copy_to(parameters)
    return (spent + time.time() - began) / 60


def make_optimizers(trained, plan):
    """Muon for the matrices of Wan blocks where the plan says so, AdamW for the rest."""
    matrices = [p for name, p in trained.named_parameters() if plan["muon_rate"] and "blocks." in name and p.ndim == 2]
    taken = {id(p) for p in matrices}
    others = [p for p in trained.parameters() if p.requires_grad and id(p) not in taken]
    optimizers = [torch.optim.AdamW(others, lr=plan["learning_rate"], betas=(0.9, 0.98), weight_decay=0.01)]
    if matrices:
        optimizers.append(torch.optim.Muon(matrices, lr=plan["muon_rate"], weight_decay=0.01))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
    return optimizers


# ---- autoencoder -----------------------------------------------------------------------------------------------------

def train_autoencoder(folder, work):
    """Pictures -> latents -> pictures. The latents' mean is used, plus fixed noise that keeps the latent space smooth.

    At one frame only the last temporal taps run: the other taps and the time convolutions keep their initial values.
    """
    torch.manual_seed(SEED)
    network = pictures.use_single_frame_path(AutoencoderKLWan(**AUTOENCODER))

    def loss_of(random, generator, progress):
        plan = PLAN["autoencoder"]
        scenes = [shapes.random_scene(random) for _ in range(plan["batch_size"])]
        drawn = np.stack([shapes.draw(scene, random) for scene in scenes])
        pixels = pictures.to_pixels(drawn)
        ground = torch.from_numpy(np.stack([shapes.BACKGROUNDS[s.background] for s in scenes])).float() / 127.5 - 1
        weight = 1 + 3 * ((pixels - ground[:, :, None, None]).abs().amax(1, keepdim=True) > 0.1).float()
        mean = network.encode(pixels.unsqueeze(2)).latent_dist.mode()
        raw_latents = mean + 0.1 * torch.randn(mean.shape, generator=generator)
        seen = network.decode(raw_latents).sample.squeeze(2)
        error = seen - pixels
        edges = sum((weight.narrow(dim, 1, 63) * error.diff(dim=dim).abs()).mean() for dim in (2, 3))
        reconstruction = (weight * (error.abs() + error.square())).mean() + edges
        return reconstruction + 1e-3 * mean.square().mean(), {"loss": reconstruction}

    # The clamp at the end of decode() stops gradients outside -1..1; the palette stays inside it.
    minutes = fit("autoencoder", network, loss_of, work, PLAN["autoencoder"])
    network.eval().requires_grad_(False)
    mean, std = latent_statistics(network)
    network.register_to_config(latents_mean=mean, latents_std=std)
    network.save_pretrained(folder / "vae")
    drawn, scenes = some_pictures(seed=1, count=1000)
    seen = np.concatenate([pictures.to_pictures(pictures.decode_latents(network, pictures.encode_images(
        network, pictures.to_pixels(chunk)))) for chunk in np.array_split(drawn, 20)])
    error = np.mean((seen.astype(np.float32) - drawn) ** 2)
    right = np.mean([shapes.read_picture(picture) == scene for picture, scene in zip(seen, scenes)])
    return {"minutes": minutes, "read_whole_after_round_trip": float(right), "psnr_db": float(10 * np.log10(255**2 / error)),
            "parameters": network.num_parameters()}


def latent_statistics(network):
    drawn, _ = some_pictures(seed=2, count=2000)
    latents = torch.cat([network.encode(pictures.to_pixels(chunk).unsqueeze(2)).latent_dist.mode()
                         for chunk in np.array_split(drawn, 20)])
    return latents.mean((0, 2, 3, 4)).tolist(), latents.std((0, 2, 3, 4)).tolist()


def some_pictures(seed, count, held_out=False, num_objects=None):
    scenes = shapes.scenes(seed, count, held_out, num_objects)
    random = np.random.default_rng([seed, 1])
    return np.stack([shapes.draw(scene, random) for scene in scenes]), scenes


# ---- text ------------------------------------------------------------------------------------------------------------

def train_text(folder, work):
    """A word-level tokenizer and a UMT5 whose every object word knows all of its object: size, colour, shape and place.

    Learnt alone, which word belongs to which object takes seconds; learnt inside the diffusion loss it takes hours.
    """
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(folder / "tokenizer")
    torch.manual_seed(SEED)
    encoder = UMT5EncoderModel(UMT5Config(vocab_size=len(tokenizer), **TEXT))
    facts = {"size": shapes.SIZES, "colour": shapes.COLOURS, "shape": shapes.SHAPES, "place": shapes.PLACES}
    heads = nn.ModuleDict({name: nn.Linear(TEXT["d_model"], len(values)) for name, values in facts.items()})
    trained = nn.ModuleDict({"encoder": encoder, "heads": heads})

    def loss_of(random, generator, progress):
        scenes = training_scenes(random, PLAN["text"]["batch_size"])
        said = [shapes.caption(scene, random) for scene in scenes]
        tokens = tokenizer(said, padding=True, return_tensors="pt")
        states = encoder(tokens.input_ids, tokens.attention_mask).last_hidden_state
        rows, columns, things = object_words(said, scenes)
        words = states[rows, columns]
        losses, right = [], torch.ones(len(things), dtype=torch.bool)
        for name, values in facts.items():
            answer = torch.tensor([list(values).index(getattr(thing, name)) for thing in things])
            guess = heads[name](words)
            losses.append(F.cross_entropy(guess, answer))
            right &= guess.argmax(-1) == answer
        return sum(losses), {"loss": sum(losses), "right": right.float().mean()}

    minutes = fit("text", trained, loss_of, work, PLAN["text"])
    encoder.eval()
    encoder.save_pretrained(folder / "text_encoder")
    with torch.no_grad():
        figures = [float(loss_of(np.random.default_rng([SEED, 99, i]), None, 1.0)[1]["right"]) for i in range(10)]
    return {"minutes": minutes, "words_that_know_their_object": float(np.mean(figures)),
            "parameters": encoder.num_parameters()}


def make_tokenizer():
    said = [caption for scene in shapes.scenes(SEED, 2000) for caption in shapes.ways_to_say(scene)]
    words = sorted({word for caption in said for word in caption.replace(",", " , ").split()})
    vocabulary = {word: index for index, word in enumerate(["<pad>", "</s>", "<unk>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>",
                                   model_max_length=512)


def object_words(said, scenes):
    """Return rows, columns and Objects: one entry for each size, colour and shape word of each caption."""
    rows, columns, things = [], [], []
    for row, (caption, scene) in enumerate(zip(said, scenes)):
        words = caption.replace(",", " , ").split()
        for thing in scene.objects:
            start = next(i for i in range(len(words)) if words[i:i + 3] == str(thing).split())
            rows += [row] * 3
            columns += [start, start + 1, start + 2]
            things += [thing] * 3
    return rows, columns, things


def training_scenes(random, count):
    drawn = (shapes.random_scene(random) for _ in iter(int, 1))
    wanted = (scene for scene in drawn if not shapes.is_held_out(scene))
    return [next(wanted) for _ in range(count)]


# ---- experts ---------------------------------------------------------------------------------------------------------

def train_experts(folder, work):
    """One network for every noise level first, then a copy for each side of the boundary; text encoder frozen."""
    network_of_pictures = pictures.load_autoencoder(folder)
    tokenizer, encoder = text.load_text_encoder(folder)
    latents, scenes = encoded_scenes(network_of_pictures, work)
    labels = torch.from_numpy(np.stack([layout(scene) for scene in scenes]))                 # (scenes, N, 3)
    empty = text.encode_prompts(tokenizer, encoder, [""])[0]

    torch.manual_seed(SEED)
    trained = nn.ModuleDict({"network": make_expert(),
                             "where": nn.Linear(128, GRID * GRID), "what": nn.Linear(128, 7 + 6 + 3)})

    def loss_between(lowest, highest, batch_size):
        def loss_of(random, generator, progress):
            index = random.integers(len(scenes), size=batch_size)
            said = [shapes.caption(scenes[i], random) for i in index]
            embeddings = text.encode_prompts(tokenizer, encoder, said, batch_size)
            dropped = random.random(batch_size) < PROMPT_DROPOUT
            packed = pack_text([empty if drop else embedding for embedding, drop in zip(embeddings, dropped)])
            clean = latents[index].float()
            noise = torch.randn(clean.shape, generator=generator)
            uniform = (torch.rand(batch_size, generator=generator) + torch.arange(batch_size)) / batch_size
            level = flow.shift_noise_level(lowest + (highest - lowest) * uniform, SHIFT)
            velocity, (early, middle) = one_frame_velocity(
                trained["network"], flow.add_noise(clean, noise, level), schedule.TIMESTEPS * level, packed.tokens,
                packed.logit_bias, feature_blocks=(0, 2))
            error = (velocity - (noise - clean)).square().mean()
            where = F.cross_entropy(trained["where"](early).flatten(0, 1), torch.arange(GRID**2).repeat(batch_size))
            told = torch.from_numpy(~dropped)
            guesses = trained["what"](middle[told]).flatten(0, 1).split((7, 6, 3), -1)
            answers = labels[index][told].flatten(0, 1).unbind(-1)
            what = sum(F.cross_entropy(guess, answer) for guess, answer in zip(guesses, answers))
            help_weight = 0.1 * (1 - progress)
            return error + help_weight * (where + what), {"velocity": error, "where": where, "what": what}
        return loss_of

    figures = {}
    turn = (BOUNDARY / (SHIFT - (SHIFT - 1) * BOUNDARY))                                     # the boundary before the shift
    spans = {"shared": (0.0, 1.0), "high": (turn, 1.0), "low": (0.0, turn)}
    for stage, (lowest, highest) in spans.items():
        if stage != "shared":
            trained["network"].load_state_dict(load_file(work / "shared.safetensors"))
        minutes = fit(stage, trained, loss_between(lowest, highest, PLAN[stage]["batch_size"]), work, PLAN[stage])
        figures[f"minutes_{stage}"] = minutes
        save_file(trained["network"].state_dict(), work / f"{stage}.safetensors")
    for stage, name in (("high", "transformer"), ("low", "transformer_2")):
        expert = WanTransformer3DModel(**EXPERT)
        expert.load_state_dict(load_file(work / f"{stage}.safetensors"))
        expert.save_pretrained(folder / name)
    figures["parameters_each"] = expert.num_parameters()
    return figures


def make_expert():
    network = WanTransformer3DModel(**EXPERT)
    dim = EXPERT["num_attention_heads"] * EXPERT["attention_head_dim"]
    network.blocks = nn.ModuleList(OneFrameBlock(dim, EXPERT["ffn_dim"], EXPERT["num_attention_heads"],
                                                 cross_attn_norm=True) for _ in range(EXPERT["num_layers"]))
    nn.init.zeros_(network.proj_out.weight)
    nn.init.zeros_(network.proj_out.bias)
    return network


def layout(scene):
    """Return what is drawn at each image token (N, 3): indices of colour, shape and size, the last of each for none."""
    answers = np.tile([len(shapes.COLOURS), len(shapes.SHAPES), len(shapes.SIZES)], (GRID, GRID, 1))
    for thing in scene.objects:
        x, y = (place // 16 for place in shapes.PLACES[thing.place])
        answers[y - 1:y + 1, x - 1:x + 1] = [list(shapes.COLOURS).index(thing.colour),
                                             shapes.SHAPES.index(thing.shape), list(shapes.SIZES).index(thing.size)]
    return answers.reshape(-1, 3)


@torch.no_grad()
def encoded_scenes(network, work):
    """Return latents (scenes, C, H, W) in float16 and their scenes; encoded once, then read from the work folder."""
    path, scenes = work / "latents.safetensors", shapes.scenes(SEED, NUM_SCENES)
    if path.exists():
        return load_file(path)["latents"], scenes
    random, latents = np.random.default_rng([SEED, 2]), []
    for start in tqdm(range(0, len(scenes), 100), desc="encoding scenes", mininterval=5):
        drawn = np.stack([shapes.draw(scene, random) for scene in scenes[start:start + 100]])
        latents.append(pictures.encode_images(network, pictures.to_pixels(drawn)).half())
    latents = torch.cat(latents).contiguous()
    save_file({"latents": latents}, path)
    return latents, scenes


# ---- the whole checkpoint --------------------------------------------------------------------------------------------

def assemble(folder, work):
    """Write what makes the parts a WanPipeline, then let the judge read what it draws for held-out captions."""
    flow.make_scheduler(SHIFT).save_pretrained(folder / "scheduler")
    parts = {"tokenizer": ["transformers", "PreTrainedTokenizerFast"], "text_encoder": ["transformers", "UMT5EncoderModel"],
             "vae": ["diffusers", "AutoencoderKLWan"], "scheduler": ["diffusers", "UniPCMultistepScheduler"],
             "transformer": ["diffusers", "WanTransformer3DModel"],
             "transformer_2": ["diffusers", "WanTransformer3DModel"]}
    index = {"_class_name": "WanPipeline", "_diffusers_version": diffusers.__version__, "boundary_ratio": BOUNDARY,
             "expand_timesteps": False, **parts}
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    pipeline = WanPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    captions = [caption for count in (1, 2) for caption in shapes.captions(SEED, 300, held_out=True, num_objects=count)]

    def draw(captions):
        drawn = []
        for start in range(0, len(captions), 50):
            noise = flow.seeded_noise((16, 1, 8, 8), range(start, start + 50))
            frames = pipeline(captions[start:start + 50], height=64, width=64, num_frames=1, latents=noise,
                              num_inference_steps=20, guidance_scale=GUIDANCE["high"],
                              guidance_scale_2=GUIDANCE["low"], output_type="np").frames
            drawn.append((frames[:, 0] * 255).round().astype(np.uint8))
        return np.concatenate(drawn)

    return {"steps": 20, **prompt_accuracy(draw, captions)}


# ---- main ------------------------------------------------------------------------------------------------------------

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("tiny_teacher"))
    parser.add_argument("--work_dir", type=Path, default=Path("outputs/tiny_teacher_work"), help="resumable state, latents")
    parser.add_argument("--stages", nargs="+", choices=("autoencoder", "text", "experts", "pipeline"))
    parser.add_argument("--threads", type=int, default=1, help="one thread is the most efficient at this size")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.output_dir.mkdir(parents=True, exist_ok=True)
    options.work_dir.mkdir(parents=True, exist_ok=True)
    record_path = options.output_dir / "training.json"
    stages = {"autoencoder": train_autoencoder, "text": train_text, "experts": train_experts,
              "pipeline": assemble}
    for name, train in stages.items():
        record = json.loads(record_path.read_text()) if record_path.exists() else {}
        if name in record.get("figures", {}) and name not in (options.stages or ()):
            continue
        if options.stages and name not in options.stages:
            continue
        print(f"{name}: training into {options.output_dir}, resumable state in {options.work_dir}", flush=True)
        record.setdefault("figures", {})[name] = train(options.output_dir, options.work_dir)
        print(name, record["figures"][name], flush=True)
        record.update(seed=SEED, world="wanlite.shapes", resolution=shapes.PICTURE_SIZE, shift=SHIFT,
                      boundary=BOUNDARY, guidance=GUIDANCE, plan=PLAN,
                      threads=options.threads, torch=torch.__version__)
        record_path.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
