"""Small text encoders and decoders: their projection, their training, and the folder that they are saved in."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan, WanPipeline
from torch import nn

import train_distillation
from tests.conftest import ROOT, SHORT_RUN, run_script
from wanlite import WanLitePipeline
from wanlite.data.autoencoder import (
    decode_latents,
    encode_images,
    load_autoencoder,
    load_video_autoencoder,
    to_pixels,
)
from wanlite.data.single_frame import SingleFrameAutoencoder
from wanlite.data.text_encoder import load_text_encoder
from wanlite.export.__main__ import check_text_encoder
from wanlite.files.locks import alone
from wanlite.parts import loop
from wanlite.parts.decoder import convolutions_as_matrices, decode_frames, decoder_loss, peak_signal_to_noise
from wanlite.parts.decoder_projection import (
    empty_decoder,
    find_streams,
    has_width,
    project_decoder,
    sources_of,
    widest,
)
from wanlite.parts.loop import Schedule, train_part
from wanlite.parts.making import count_parameters
from wanlite.parts.options import count_decoder, default_base_dim
from wanlite.parts.text_encoder import encode, tokenize_all
from wanlite.parts.text_projection import (
    EncoderFiles,
    TextShape,
    default_shape,
    project_text_encoder,
    split_blocks,
)
from wanlite.planning.duration import h100_hours
from wanlite.planning.part_plan import PartWork, count_decoder_bytes, count_decoding, plan_parts
from wanlite.planning.resolve import complete as complete_run
from wanlite.planning.settings import make_parser
from wanlite.planning.simulation import simulate_peak
from wanlite.runtime.signals import Stopped
from wanlite.small import complete, read_settings
from wanlite.student.digest import model_digest
from wanlite.training.checkpoints import latest_checkpoint, load_checkpoint
from wanlite.world import emoji, shapes

TEACHERS = {"tiny": (ROOT / "tiny_teacher", shapes), "emoji": (ROOT / "emoji_teacher", emoji)}
FEW = ("--student_images", "64", "--decoder_steps", "6", "--reading_steps", "6", "--text_velocity_steps", "4")
BOTH = ("--text_encoder", "small", "--decoder", "small")


@pytest.fixture(scope="module")
def latents():
    """Latents of images of the tiny world."""
    images = np.stack([shapes.draw(scene) for scene in shapes.scenes(0, 24)])
    return encode_images(load_autoencoder(ROOT / "tiny_teacher"), to_pixels(images))


def psnr(wide, narrow, latents):
    return peak_signal_to_noise(SingleFrameAutoencoder(wide), SingleFrameAutoencoder(narrow), latents)


def wan21(**changed):
    """An autoencoder of Wan 2.1's kind, with new weights that are loud enough to compare."""
    torch.manual_seed(0)
    config = {"base_dim": 8, "dim_mult": [1, 2, 2], "num_res_blocks": 1, "temperal_downsample": [False, True]}
    autoencoder = AutoencoderKLWan(**config, **changed).eval()
    for name, weight in autoencoder.named_parameters():
        weight.data.mul_(2.0 if name.endswith("weight") else 1.0)
    return autoencoder


# ---- decoder -----------------------------------------------------------------------------------------------


def make_autoencoder(kind):
    if kind == "tiny":
        return load_video_autoencoder(ROOT / "tiny_teacher")
    return wan21(decoder_base_dim=12) if kind == "unequal" else wan21()


@pytest.mark.parametrize("kind", ["tiny", "wan21", "unequal"])
def test_a_decoder_of_the_same_width_is_the_same_function(kind, latents):
    wide = make_autoencoder(kind)
    same = project_decoder(wide, wide.config.decoder_base_dim or wide.config.base_dim, latents[:2])
    assert psnr(wide, same, latents[2:]) > 90


@pytest.mark.parametrize("kind", ["tiny", "wan21", "unequal"])
def test_a_narrow_decoder_starts_closer_than_copied_weights_and_than_new_ones(kind, latents):
    wide = make_autoencoder(kind)
    width = (wide.config.decoder_base_dim or wide.config.base_dim) // 2
    narrow = project_decoder(wide, width, latents[:16])
    assert narrow.decoder.dim == width
    torch.manual_seed(0)
    new = AutoencoderKLWan.from_config(narrow.config)
    new.post_quant_conv.load_state_dict(wide.post_quant_conv.state_dict())
    own = psnr(wide, narrow, latents[16:])
    assert own > psnr(wide, new, latents[16:]) + 3
    assert own > psnr(wide, empty_decoder(wide, width), latents[16:]) + 1


def test_a_small_decoder_is_a_stock_class_that_decodes_single_frames_alike(latents):
    narrow = project_decoder(load_video_autoencoder(ROOT / "tiny_teacher"), 8, latents[:2])
    stock = AutoencoderKLWan.from_config(narrow.config)
    stock.load_state_dict(narrow.state_dict())
    own = decode_latents(SingleFrameAutoencoder(narrow), latents[:1])
    assert torch.allclose(decode_frames(narrow, latents[:1]).clamp(-1, 1), own, atol=1e-5)
    mean, std = (
        torch.tensor(values).view(1, -1, 1, 1, 1)
        for values in (stock.config.latents_mean, stock.config.latents_std)
    )
    with torch.no_grad():
        frame = stock.eval().decode(latents[:1].unsqueeze(2) * std + mean).sample
    assert torch.allclose(frame.squeeze(2), own, atol=1e-4)


def test_taps_of_earlier_frames_are_zero(latents):
    narrow = project_decoder(load_video_autoencoder(ROOT / "tiny_teacher"), 8, latents[:2])
    kernels = [module.weight for module in narrow.decoder.modules() if isinstance(module, nn.Conv3d)]
    assert sum(kernel.shape[2] > 1 for kernel in kernels) > 5
    assert not any(kernel[:, :, :-1].any() for kernel in kernels)


def test_channels_that_are_repeated_are_kept_together():
    decoder = load_video_autoencoder(ROOT / "tiny_teacher").decoder
    streams = find_streams(decoder)
    repeats = [stream.repeat for stream in streams if stream.repeat is not None]
    assert len(repeats) == 2
    for repeat in repeats:
        channels = torch.arange(repeat.in_channels, dtype=torch.float32).view(1, -1, 1, 1, 1)
        output = repeat(channels, first_chunk=True).flatten(2)[0]  # (C, places)
        for sources, found in zip(sources_of(repeat).tolist(), output.tolist()):
            assert set(found) <= set(sources)


@pytest.mark.parametrize("width", [0, 17, 1000])
def test_an_impossible_width_of_a_decoder_is_refused(width, latents):
    with pytest.raises(ValueError, match=f"a decoder of {width} channels cannot be made of one of 16"):
        project_decoder(load_video_autoencoder(ROOT / "tiny_teacher"), width, latents)


def test_an_odd_width_that_is_halved_is_refused(latents):
    with pytest.raises(ValueError, match="expected an even number from 2 to 8"):
        project_decoder(wan21(), 3, latents)


# ---- text encoder ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=TEACHERS)
def text(request):
    """A text encoder, calibration tokens, held-out tokens, and a layer that reads it."""
    folder, world = TEACHERS[request.param]
    tokenizer, encoder = load_text_encoder(folder, dtype=torch.float32)
    tokens = [
        tokenize_all(tokenizer, world.captions(seed, 64, held_out=held_out), 512)
        for seed, held_out in ((1, False), (2, True))
    ]
    width = encoder.config.d_model
    reader = torch.randn(2 * width, width, generator=torch.Generator().manual_seed(0)) / width**0.5
    return encoder, *tokens, reader, EncoderFiles(folder)


def relative_error(text, shape):
    encoder, tokens, held_out, reader, files = text
    small, weight = project_text_encoder(files, shape, tokens, reader)
    with torch.no_grad():
        target = held_out.rows(encode(encoder, held_out) @ reader.T)
        read = held_out.rows(encode(small, held_out) @ weight.T)
    return float((read - target).square().sum() / target.square().sum())


def full_shape(config):
    return TextShape(config.d_model, config.num_layers, config.num_heads, config.d_ff)


def test_a_text_encoder_of_the_same_shape_is_the_same_function(text):
    assert relative_error(text, full_shape(text[0].config)) < 1e-5


def test_a_smaller_text_encoder_is_worse_and_better_than_the_mean(text):
    config = text[0].config
    half = TextShape(config.d_model // 2, config.num_layers, config.num_heads // 2, config.d_ff // 2)
    errors = [relative_error(text, shape) for shape in (half, default_shape(config))]
    assert 0.001 < errors[0] < errors[1] < 0.9


@pytest.mark.parametrize(("blocks", "depth"), [(24, 10), (24, 24), (5, 1), (7, 3)])
def test_each_block_belongs_to_one_span(blocks, depth):
    spans = split_blocks(blocks, depth)
    assert sum(spans) == blocks and len(spans) == depth and min(spans) >= 1


def test_an_impossible_shape_of_a_text_encoder_is_refused(text):
    encoder, tokens, _, reader, files = text
    config = encoder.config
    for name, shape in (
        ("width", TextShape(config.d_model + 1, 1, 1, 1)),
        ("depth", TextShape(8, config.num_layers + 1, 1, 1)),
        ("heads", TextShape(8, 1, config.num_heads + 1, 1)),
        ("neurons", TextShape(8, 1, 1, 0)),
    ):
        with pytest.raises(ValueError, match=f"a text encoder with {name}"):
            project_text_encoder(files, shape, tokens, reader)


def test_a_real_pipeline_becomes_small():
    """A14B's text encoder and autoencoder, with the default sizes."""
    settings = train_distillation.Settings(text_encoder="small", decoder="small")
    teacher = SimpleNamespace(components={"text_encoder": Path("umt5.pth")}, autoencoder_config={})
    plan = plan_parts(settings, teacher)
    assert plan.count_bytes(282_000_000) < 1.5e9
    assert count_parameters(plan.small_encoder) < count_parameters(plan.encoder) / 5
    small, large = (count_decoding(each, [64, 64]) for each in (plan.small_autoencoder, plan.autoencoder))
    assert small < large / 4 and 1.0e12 < large < 1.3e12
    with torch.device("meta"):
        student = train_distillation.WanLiteStudent(hidden_size=1024, depth=16, num_heads=16)
    work = PartWork(plan, student, (16, 64, 64), 1024, text_tokens=64, num_steps=4)
    assert 0.5 < h100_hours(work.h100_operations) < 2
    assert count_decoder_bytes(plan, simulate_peak) < 12e9


@pytest.mark.parametrize("kind", ["tiny", "wan21", "real"])
def test_the_default_decoder_has_at_most_a_quarter_of_the_parameters(kind):
    config = {} if kind == "real" else make_autoencoder(kind).config
    width = default_base_dim(config)
    assert has_width(config, width) and width <= 32
    assert count_decoder(config, width) <= count_decoder(config, widest(config)) / 4
    wider = next(each for each in range(width + 1, 99) if has_width(config, each))
    assert wider > 32 or count_decoder(config, wider) > count_decoder(config, widest(config)) / 4


# ---- training ----------------------------------------------------------------------------------------------


class StopAfter:
    """A signal that arrives before a step, counted over all phases."""

    is_immediate = True

    def __init__(self, step):
        self.left = step

    @property
    def is_set(self):
        self.left -= 1
        return self.left < 0


def train_layer(folder, stop=None, facts=None):
    torch.manual_seed(0)
    layer = nn.Linear(4, 4)

    def loss(generator):
        return (layer(torch.randn(8, 4, generator=generator)) - 1).square().mean()

    train_part("layer", folder, layer, loss, Schedule(20, 1e-2, 0, 6), facts or {}, stop)
    return torch.cat([weight.flatten() for weight in layer.state_dict().values()])


def test_a_trained_network_has_the_averaged_weights(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "AVERAGED_SHARE", 0.5)
    trained = train_layer(tmp_path)
    state = load_checkpoint(latest_checkpoint(tmp_path)[0])
    last, averaged = ([*each] for each in (state["weights"].values(), state["ema"]["shadow_params"]))
    assert torch.equal(torch.cat([weight.flatten() for weight in averaged]), trained)
    assert not torch.allclose(torch.cat([weight.flatten() for weight in last]), trained, atol=1e-4)


@pytest.mark.parametrize("step", [1, 7, 19])
def test_a_stopped_training_ends_with_the_same_weights(tmp_path, step):
    expected = train_layer(tmp_path / "whole")
    with pytest.raises(Stopped):
        train_layer(tmp_path / "stopped", StopAfter(step))
    assert torch.equal(train_layer(tmp_path / "stopped"), expected)
    assert torch.equal(train_layer(tmp_path / "stopped"), expected)  # finished: nothing is trained


def train_decoder(latents, folder, steps, stop=None):
    wide = load_video_autoencoder(ROOT / "tiny_teacher").requires_grad_(False)
    narrow = project_decoder(wide, 8, latents[:16]).requires_grad_(False)
    narrow.decoder.requires_grad_(True)
    loss = decoder_loss(SingleFrameAutoencoder(wide), narrow, latents[:16], 8)
    with convolutions_as_matrices(narrow.decoder):
        train_part("decoder", folder, narrow, loss, Schedule(steps, 5e-4, 0, 4), {}, stop)
    return wide, narrow


def test_a_stopped_decoder_ends_with_the_same_weights(latents, tmp_path):
    _, expected = train_decoder(latents, tmp_path / "whole", 8)
    with pytest.raises(Stopped):
        train_decoder(latents, tmp_path / "stopped", 8, StopAfter(6))
    _, resumed = train_decoder(latents, tmp_path / "stopped", 8)
    kernels = resumed.state_dict()
    assert (
        kernels.keys() == project_decoder(resumed, 8, latents[:2]).state_dict().keys()
    )  # no matrices are left
    assert all(torch.equal(tensor, kernels[name]) for name, tensor in expected.state_dict().items())
    assert not resumed.decoder.conv_in.weight[:, :, :-1].any()


def test_training_brings_a_decoder_closer(latents, tmp_path):
    wide, narrow = train_decoder(latents, tmp_path, 100)
    projected = project_decoder(wide, 8, latents[:16])
    seen = latents[:16]  # so few images are learned by heart
    assert psnr(wide, narrow, seen) > psnr(wide, projected, seen)


def test_a_training_of_other_settings_is_not_continued(tmp_path):
    with pytest.raises(Stopped):
        train_layer(tmp_path, StopAfter(7))
    with pytest.raises(OSError, match="under other settings or of other weights"):
        train_layer(tmp_path, facts={"seed": 1})


# ---- the folder --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small_run(finished_run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("small") / "student"
    process = run_script("-m", "wanlite.small", "--model", finished_run[0], "--output_dir", folder, *FEW)
    assert process.returncode == 0, process.stderr
    return folder, process.stdout


def test_the_folder_says_what_it_holds(small_run, finished_run):
    folder, output = small_run
    assert "MB for the" in output and "held-out captions drawn right" in output
    assert not (folder / "work").exists() and not list(folder.glob(".*"))
    record = json.loads((folder / "run.json").read_text())
    assert record["model_sha256"] == model_digest(folder)
    figures = record["parts"]["figures"]
    for part in ("decoder", "text_encoder"):
        assert figures[part]["parameters"] < 0.4 * figures[part]["large_parameters"]
    assert len(figures["text_encoder"]["worst_prompts"]) == 10
    assert "| text encoder |" in (folder / "README.md").read_text()
    assert json.loads((finished_run[0] / "run.json").read_text()).get("parts") is None


def test_stock_diffusers_draws_with_small_parts_what_this_package_draws(small_run):
    folder, _ = small_run
    classes = json.loads((folder / "model_index.json").read_text())
    assert {name for name, *_ in (value for value in classes.values() if isinstance(value, list))} <= {
        "diffusers",
        "transformers",
        None,
    }
    prompt = "a small red ring at the left on a white background"
    own, stock = WanLitePipeline.from_pretrained(folder), WanPipeline.from_pretrained(folder)
    assert stock.text_encoder.config.d_model == own.transformer.config.text_dim == 32
    assert stock.vae.config.decoder_base_dim == 7
    for pipeline in (own, stock):
        pipeline.text_encoder.float()  # bfloat16 differs with the length of the padding on some CPUs
    image = own(prompt, generator=torch.Generator().manual_seed(1), output_type="np").images[0]
    size = dict(height=image.shape[0], width=image.shape[1], num_frames=1, guidance_scale=1.0)
    frames = stock(
        prompt, **size, num_inference_steps=4, generator=torch.Generator().manual_seed(1), output_type="np"
    ).frames
    assert np.abs(frames[0][0] - image).max() < 1e-4


def test_the_student_differs_in_the_layer_that_reads_text_only(small_run, finished_run):
    small, large = (
        WanLitePipeline.from_pretrained(folder).transformer.state_dict()
        for folder in (small_run[0], finished_run[0])
    )
    changed = [name for name, tensor in large.items() if not torch.equal(tensor, small[name])]
    assert changed == ["condition_embedder.text_embedder.linear_1.weight"]


def test_one_part_alone_can_be_made_small(finished_run, tmp_path):
    process = run_script(
        "-m",
        "wanlite.small",
        "--model",
        finished_run[0],
        "--output_dir",
        tmp_path / "s",
        "--text_encoder",
        "large",
        *FEW,
    )
    assert process.returncode == 0, process.stderr
    config = json.loads((tmp_path / "s/text_encoder/config.json").read_text())
    assert config["d_model"] == 64
    weights = [
        Path(folder) / "text_encoder/model.safetensors" for folder in (finished_run[0], tmp_path / "s")
    ]
    assert weights[0].samefile(weights[1])  # a hard link


def test_settings_that_cannot_be_met_are_refused_before_torch(small_run, finished_run, tmp_path, capsys):
    folder, large = small_run[0], finished_run[0]
    for arguments, expected in (
        (["--model", large, "--text_encoder", "large", "--decoder", "large"], "leave nothing to make"),
        (["--model", large, "--output_dir", large], "is the student's own folder"),
        (["--model", folder], "has small parts already"),
        (["--model", large, "--output_dir", folder], "holds a finished student"),
        (["--model", tmp_path], "config.json"),
        (["--model", large, "--decoder_steps", "0"], "--decoder_steps is 0"),
    ):
        with pytest.raises(SystemExit) as ended:
            read_settings([str(argument) for argument in arguments])
        assert ended.value.code == 2
        assert expected in capsys.readouterr().err


def test_too_large_parts_are_refused_with_one_line(finished_run, tmp_path):
    for flag, expected in (
        (("--decoder_base_dim", "64"), "a decoder of 64 channels cannot be made of one of 16"),
        (("--text_width", "128"), "a text encoder with width 128"),
    ):
        process = run_script(
            "-m", "wanlite.small", "--model", finished_run[0], "--output_dir", tmp_path, *FEW, *flag
        )
        assert process.returncode == 2
        assert expected in process.stderr.splitlines()[-1]


def test_the_default_folder_lies_in_that_of_the_student(finished_run):
    settings = complete(read_settings(["--model", str(finished_run[0])]))
    assert settings.output_dir == str(finished_run[0] / "small")


# ---- as the last phases of a run ---------------------------------------------------------------------------


def copy_run(finished_run, folder):
    """Return a copy of a finished run, and the command that makes its small parts."""
    shutil.copytree(finished_run[0], folder)
    return (ROOT / "train_distillation.py", "--output_dir", folder, *SHORT_RUN, *BOTH, *FEW)


def make_parts_of(folder, stop=None, **others):
    recorded = json.loads((folder / "run.json").read_text())["settings"]
    arguments = {"output_dir": str(folder), "text_encoder": "small", "decoder": "small"}
    few = {flag.removeprefix("--"): int(value) for flag, value in zip(FEW[::2], FEW[1::2])}
    train_distillation.make_parts(train_distillation.Settings(**recorded | arguments | few | others), stop)


def read_weights(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*.safetensors")}


def test_a_finished_run_gets_its_small_parts_without_training(finished_run, tmp_path):
    folder = tmp_path / "run"
    arguments = copy_run(finished_run, folder)
    student = (folder / "diffusion_pytorch_model.safetensors").read_bytes()
    process = run_script(*arguments)
    assert process.returncode == 0, process.stderr
    assert (folder / "diffusion_pytorch_model.safetensors").read_bytes() == student
    assert (
        "held-out captions drawn right" in process.stdout and f"--model {folder / 'small'}" in process.stdout
    )
    record = json.loads((folder / "run.json").read_text())
    assert record["small"]["folder"] == "small" and record["finished"]
    assert (
        record["small"]["figures"] == json.loads((folder / "small/run.json").read_text())["parts"]["figures"]
    )
    assert "<h2>Small parts</h2>" in (folder / "report.html").read_text()
    again = run_script(*arguments)
    assert again.returncode == 2 and "holds a finished run" in again.stderr


@pytest.mark.slow
def test_parts_stopped_in_each_phase_are_those_that_were_not(finished_run, tmp_path):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    for folder in (whole, stopped):
        copy_run(finished_run, folder)
    make_parts_of(whole)
    work, phases = stopped / "small/work", []
    for step in (0, 5, 4, 7, 1):  # before any image, and within each phase
        with pytest.raises(Stopped):
            make_parts_of(stopped, StopAfter(step))
        assert not (stopped / "small/run.json").exists()
        phases.append({path.name for path in work.iterdir()} & {"decoder", "reading", "text_velocity"})
    assert phases[0] == set() and phases[-1] == {"decoder", "reading", "text_velocity"}
    make_parts_of(stopped)
    assert read_weights(stopped / "small") == read_weights(whole / "small")
    assert not work.exists()


def test_steps_that_do_not_lower_the_held_out_loss_are_dropped(finished_run, tmp_path, capsys):
    copy_run(finished_run, tmp_path / "run")
    make_parts_of(tmp_path / "run")
    assert "decoder: 6 steps do not lower the held-out loss" in capsys.readouterr().out
    figures = json.loads((tmp_path / "run/run.json").read_text())["small"]["figures"]["decoder"]
    assert abs(figures["psnr"] - figures["projected_psnr"]) < 0.1  # weights are rounded


def test_a_run_of_other_settings_is_not_given_small_parts(finished_run, tmp_path):
    process = run_script(*copy_run(finished_run, tmp_path / "run"), "--seed", "1")
    assert process.returncode == 2 and "holds a finished run" in process.stderr


def test_small_parts_of_other_sizes_are_not_replaced(small_run, finished_run, tmp_path):
    folder = tmp_path / "run"
    copy_run(finished_run, folder)
    shutil.copytree(small_run[0], folder / "small")
    make_parts_of(folder)  # they are those of these settings
    assert "small" in json.loads((folder / "run.json").read_text())
    shutil.copy(finished_run[0] / "run.json", folder)
    record = json.loads((folder / "small/run.json").read_text())
    record["parts"]["options"]["seed"] = 1
    (folder / "small/run.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match="holds small parts of other settings or of another student"):
        make_parts_of(folder)


def test_small_parts_are_made_by_one_command_at_a_time(finished_run, tmp_path):
    shutil.copytree(finished_run[0], tmp_path / "run")
    folder = tmp_path / "run/small"
    with alone(folder), pytest.raises(OSError, match=f"{folder}: process .* is writing there"):
        make_parts_of(tmp_path / "run")
    assert not folder.exists()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (
            ["--max_train_steps", "0", "--student", "DIR", "--text_encoder", "small"],
            "python -m wanlite.small --model DIR",
        ),
        (["--project_only", "--decoder", "small"], "is made for a trained one"),
        (["--text_width", "16"], "which needs --text_encoder small"),
        (["--text_encoder", "small", "--decoder_base_dim", "4"], "which needs --decoder small"),
    ],
)
def test_settings_of_small_parts_that_contradict_are_refused(arguments, expected, tmp_path):
    parser = make_parser(train_distillation.Settings, "")
    settings = train_distillation.Settings(
        **vars(parser.parse_args([*arguments, "--output_dir", str(tmp_path)]))
    )
    with pytest.raises(ValueError, match=expected):
        complete_run(settings)


def test_a_student_with_small_parts_is_not_trained_further(small_run, tmp_path):
    settings = train_distillation.Settings(student=str(small_run[0]), output_dir=str(tmp_path))
    with pytest.raises(ValueError, match="has small parts, and training needs the teacher's"):
        complete_run(settings)


def test_the_plan_has_the_sizes_steps_and_time_of_small_parts(tmp_path, capsys):
    small = ["--output_dir", str(tmp_path), *BOTH, "--text_width", "16"]
    settings = train_distillation.Settings(
        **vars(make_parser(train_distillation.Settings, "").parse_args([*small, "--dry_run"]))
    )
    assert train_distillation.plan(complete_run(settings), small) == 0
    plan = " ".join(capsys.readouterr().out.split())
    assert "text encoder: width 16, 1 block," in plan and "decoder: 7 channels, 0.09 M parameters" in plan
    assert "steps: decoder 1,500, reading 1,500, text_velocity 400, on 4,000 images" in plan
    with pytest.raises(ValueError, match="a text encoder with width 128"):
        train_distillation.plan(complete_run(replace(settings, text_width=128)), small)


def test_a_small_student_is_not_exported_for_comfyui(small_run, tmp_path):
    with pytest.raises(ValueError, match="reads a small text encoder, and ComfyUI has UMT5-XXL"):
        check_text_encoder(json.loads((small_run[0] / "run.json").read_text()), small_run[0])
