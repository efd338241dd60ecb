"""Tiny teachers: the data of their training, its exact resume, and their names."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from tests.conftest import ROOT, TINY_TEACHER
from tools import train_tiny_teacher as tool
from tools.recipes import EMOJI, GRID, RECIPES, SHAPES, TOKEN
from wanlite.planning.defaults import choose_prompts
from wanlite.planning.resolve import EMOJI_TEACHER, NAMED_TEACHERS, choose_teacher
from wanlite.world import emoji, shapes
from wanlite.world.emoji.captions import PLURALS
from wanlite.world.record import read_world

# ---- captions and labels -----------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_every_caption_has_words_for_each_object_and_a_value_for_each_fact(recipe):
    captions = recipe.world.captions(3, 200)
    rows, columns, facts = tool.spoken_words(captions, recipe)
    assert set(rows) == set(range(200))
    for row, column, its_facts in zip(rows, columns, facts):
        word = captions[row].replace(",", " , ").split()[column]
        assert word in " ".join(map(str, its_facts.values())) or word in PLURALS.values()
        assert all(its_facts[name] in values for name, values in recipe.facts.items())


def test_each_word_has_the_facts_of_its_own_object():
    caption = "on a grey background, a flat fox below a cat"
    _, columns, facts = tool.spoken_words([caption], EMOJI)
    words = [caption.replace(",", " , ").split()[column] for column in columns]
    facts_of = {
        word: (fact["name"], fact["style"], fact["place"], fact["background"])
        for word, fact in zip(words, facts)
    }
    assert facts_of == {
        "flat": ("fox", "flat", "bottom", "grey"),
        "fox": ("fox", "flat", "bottom", "grey"),
        "cat": ("cat", None, "top", "grey"),
    }


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_image_tokens_are_labelled_where_something_is_drawn(recipe):
    for scene in recipe.world.scenes(5, 60):
        labels = recipe.layout(scene)
        assert labels.shape == (GRID**2, len(recipe.labels)) and (labels < list(recipe.labels.values())).all()
        differs = np.abs(recipe.world.draw(scene) - recipe.world.ground(scene)).max(-1) > 20
        drawn = differs.reshape(GRID, TOKEN, GRID, TOKEN).mean((1, 3)).ravel()
        is_labelled = labels[:, 0] < list(recipe.labels.values())[0] - 1
        assert drawn[is_labelled].min() > 0 and drawn[~is_labelled].max() < 0.6


def test_the_tokenizer_of_emoji_has_every_word_of_their_world():
    tokenizer = tool.make_tokenizer(EMOJI)
    words = {*emoji.NAMES, *PLURALS.values(), *emoji.STYLES, *emoji.SIZES, *emoji.PLACES, *emoji.BACKGROUNDS}
    assert words <= set(tokenizer.get_vocab())
    assert not any(
        tokenizer.unk_token_id in ids for ids in tokenizer(emoji.captions(7, 3000, held_out=True)).input_ids
    )


# ---- one loop for every stage ------------------------------------------------------------------------------


def small_network():
    torch.manual_seed(0)
    return nn.ModuleDict(
        {"blocks": nn.ModuleList([nn.Linear(16, 16)]), "kernel": nn.Conv3d(4, 16, (3, 2, 2))}
    )


def loss_of(network):
    def loss(random, generator, progress):
        states = network["kernel"](torch.randn(8, 4, 3, 4, 4, generator=generator)).mean((2, 3, 4))
        error = (network["blocks"][0](states) - random.random()).square().mean()
        return error, {"error": error}

    return loss


def make_run(folder, steps, decay=0.5):
    plan = {"text": dict(steps=steps, batch_size=8, learning_rate=1e-2, muon_rate=0.02, ema=0.9, decay=decay)}
    return tool.Run(replace(SHAPES, plan=plan), folder, folder, "cpu", threads=1, save_seconds=-1)


def test_a_killed_stage_resumes_to_the_weights_of_an_uninterrupted_one(tmp_path):
    uninterrupted, killed = small_network(), small_network()
    (tmp_path / "uninterrupted").mkdir()
    tool.fit("text", uninterrupted, loss_of(uninterrupted), make_run(tmp_path / "uninterrupted", 12))
    losses = loss_of(killed)

    def interrupt(random, generator, progress):
        if progress >= 0.5:
            raise KeyboardInterrupt
        return losses(random, generator, progress)

    with pytest.raises(KeyboardInterrupt):
        tool.fit("text", killed, interrupt, make_run(tmp_path, 12))
    resumed = small_network()
    tool.fit("text", resumed, loss_of(resumed), make_run(tmp_path, 12))
    assert all(torch.equal(a, b) for a, b in zip(uninterrupted.parameters(), resumed.parameters()))
    assert not list(tmp_path.glob("*.partial"))


def test_added_steps_change_nothing_before_the_learning_rate_falls():
    few, many = ([tool.decayed(step / count, 0.25) for step in range(60)] for count in (80, 200))
    assert few == many == [1.0] * 60
    assert tool.decayed(0.9, 0.2) == pytest.approx(0.5) and tool.decayed(1.0, 0.2) == 0
    assert [tool.decayed(progress, None) for progress in (0, 0.5, 1)] == pytest.approx([1, 0.5, 0])


def test_muon_updates_a_kernel_as_a_matrix_but_no_taps_without_gradient():
    convolution, matrix = nn.Conv3d(6, 16, (3, 2, 2)), nn.Parameter(torch.zeros(16, 24))
    matrix.data.copy_(convolution.weight[:, :, -1].flatten(1))
    before = convolution.weight.detach().clone()
    ours = tool.KernelMuon([convolution.weight], lr=0.1, weight_decay=0.0)
    stock = torch.optim.Muon([matrix], lr=0.1, weight_decay=0.0)
    gradient = torch.randn(16, 24, generator=torch.Generator().manual_seed(0))
    convolution.weight.grad = torch.zeros_like(before)
    convolution.weight.grad[:, :, -1] = gradient.view(16, 6, 2, 2)
    matrix.grad = gradient
    ours.step()
    stock.step()
    assert torch.equal(convolution.weight[:, :, :-1], before[:, :, :-1])
    assert torch.allclose(convolution.weight[:, :, -1].flatten(1), matrix, atol=1e-2)
    assert not torch.equal(convolution.weight, before)


def test_muon_trains_only_matrices_of_blocks_and_kernels_of_the_autoencoder():
    def moved(recipe, stage, network):
        names = {parameter.data_ptr(): name for name, parameter in network.named_parameters()}
        first, *others = tool.make_optimizers(network, recipe.plan[stage])
        assert len(names) == sum(len(optimizer.param_groups[0]["params"]) for optimizer in [first, *others])
        return {
            names[matrix.data_ptr()] for optimizer in others for matrix in optimizer.param_groups[0]["params"]
        }

    autoencoder = tool.AutoencoderKLWan(**SHAPES.autoencoder)
    assert moved(SHAPES, "autoencoder", autoencoder) == set()
    kernels = moved(EMOJI, "autoencoder", autoencoder)
    assert "decoder.mid_block.resnets.0.conv1.weight" in kernels and not any(
        "time_conv" in name for name in kernels
    )
    assert all("network.blocks." in name for name in moved(SHAPES, "shared", tool.make_trained(SHAPES)))


def test_shards_of_scenes_are_made_once_and_a_missing_one_is_made_again(tmp_path):
    network, tokenizer = (
        tool.vae.load_autoencoder(TINY_TEACHER),
        tool.text.load_tokenizer(TINY_TEACHER / "tokenizer"),
    )
    run = tool.Run(replace(SHAPES, num_scenes=40), tmp_path, tmp_path, "cpu", threads=2, shard_size=20)
    first = tool.captioned_scenes(network, tokenizer, run)
    assert first["latents"].shape == (40, 16, 8, 8) and first["labels"].shape == (40, GRID * GRID, 3)
    ids = first["ids"]
    assert ids.shape[:2] == (40, tool.CAPTIONS) and (ids == tokenizer.unk_token_id).sum() == 0
    assert ids.shape[2] <= tool.TOKENS and (ids[..., -1] != tokenizer.pad_token_id).any()
    (tmp_path / "scenes-01.safetensors").unlink()
    again = tool.captioned_scenes(network, tokenizer, run)
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_every_missed_gate_is_named():
    gates = {"psnr_db": 29.0, "-residual": 0.05, "whole": 0.95}
    assert tool.missed_gates({"psnr_db": 29.0, "residual": 0.05, "whole": 0.95}, gates) == []
    assert tool.missed_gates({"psnr_db": 28.5, "residual": 0.07, "whole": 0.96}, gates) == [
        "psnr_db 28.5, expected at least 29",
        "residual 0.07, expected at most 0.05",
    ]


# ---- names -------------------------------------------------------------------------------------------------


def test_a_named_teacher_is_found_from_every_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert choose_teacher("tiny", log=pytest.fail) == choose_teacher(None) == ROOT / "tiny_teacher"


def test_a_named_teacher_wins_over_a_folder_of_its_name_and_a_line_names_both(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny").mkdir()
    lines = []
    assert (
        choose_teacher("tiny", lines.append) == ROOT / "tiny_teacher"
        and choose_teacher("./tiny") == tmp_path / "tiny"
    )
    assert len(lines) == 1 and str(ROOT / "tiny_teacher") in lines[0] and "./tiny" in lines[0]


def test_a_missing_named_teacher_is_refused_with_the_command_that_makes_it(tmp_path, monkeypatch):
    monkeypatch.setitem(NAMED_TEACHERS, "emoji", tmp_path / "emoji_teacher")
    with pytest.raises(
        OSError, match=r"emoji_teacher, expected a finished one.*tools/train_tiny_teacher.py --world emoji"
    ):
        choose_teacher("emoji")
    assert EMOJI_TEACHER == ROOT / "emoji_teacher"


@pytest.mark.parametrize("name", ["Emoji", "emoji/", "tinny", "emoji_teacher"])
def test_a_teacher_that_is_neither_a_name_nor_a_folder_is_refused(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OSError, match="no such folder"):
        choose_teacher(name)


@pytest.mark.parametrize("name, world", [("shapes", shapes), ("emoji", emoji)])
def test_a_tiny_teacher_is_trained_on_captions_of_its_own_world(name, world, tmp_path):
    (tmp_path / "training.json").write_text(json.dumps({"world": name}))
    assert read_world(tmp_path) is world
    settings = SimpleNamespace(
        prompts=None, teacher=str(tmp_path), num_trajectories=30, num_held_out=8, seed=3
    )
    training, held_out = choose_prompts(settings)
    assert len(training) == 30 and len(held_out) == 8
    assert all(world.is_held_out(world.read_caption(caption)) for caption in held_out)
    assert not any(world.is_held_out(world.read_caption(caption)) for caption in training)


@pytest.mark.parametrize("world", ["os", ["emoji"], None, "emoji.judge", "record", ""])
def test_a_record_with_an_unknown_world_is_ignored(world, tmp_path):
    (tmp_path / "training.json").write_text(json.dumps({"world": world}))
    assert read_world(tmp_path) is None
