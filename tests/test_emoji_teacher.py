"""The emoji teacher is a complete Wan2.2: stock diffusers draws with it, every layout of it is the same teacher, and
a student trains on captions of its world.
"""

import json

import numpy as np
import pytest
import torch
from diffusers import WanPipeline, WanTransformer3DModel

from tests.conftest import ROOT, SHORT_RUN, run_script, write_official
from wanlite.data.text_encoder import encode_prompts, load_text_encoder
from wanlite.flow import seeded_noise
from wanlite.network import pack_text, unpack_text
from wanlite.planning.resolve import EMOJI_TEACHER
from wanlite.teacher.checkpoint import open_teacher_files
from wanlite.teacher.model import Teacher
from wanlite.world import emoji

EXPERTS = {"high": "transformer", "low": "transformer_2"}
TIMESTEPS = torch.tensor([990.0, 875.0, 874.0, 30.0])

pytestmark = pytest.mark.skipif(
    not (EMOJI_TEACHER / "model_index.json").exists(), reason="the emoji teacher is unfinished"
)


@pytest.fixture(scope="module")
def inputs():
    """Latents (4, C, H, W), timesteps (4,), and the text of four captions and of four empty prompts."""
    tokenizer, encoder = load_text_encoder(EMOJI_TEACHER)
    prompts, empty = emoji.captions(3, 4, held_out=True), [""] * 4
    texts = (pack_text(encode_prompts(tokenizer, encoder, each)) for each in (prompts, empty))
    return seeded_noise((16, 8, 8), range(4)), TIMESTEPS, *texts


@pytest.fixture(scope="module")
def velocity(inputs):
    return Teacher(open_teacher_files(EMOJI_TEACHER)).velocity(*inputs, 3.0, 3.0)[0]


def test_wans_own_layout_is_the_same_teacher(inputs, velocity, tmp_path):
    write_official(EMOJI_TEACHER, tmp_path)
    files = open_teacher_files(tmp_path)
    assert files.layout == "official"
    assert torch.equal(Teacher(files).velocity(*inputs, 3.0, 3.0)[0], velocity)


def test_the_guided_velocity_is_that_of_stock_networks(inputs, velocity):
    latents, timesteps, *texts = inputs
    prompts, empty = map(unpack_text, texts)
    for row, timestep in enumerate(timesteps):
        folder = EXPERTS["high" if timestep >= 875 else "low"]
        network = WanTransformer3DModel.from_pretrained(EMOJI_TEACHER / folder, torch_dtype=torch.float32)
        with torch.no_grad():
            wanted, unwanted = (
                network(latents[row : row + 1, :, None], timestep[None], text[row : row + 1]).sample
                for text in (prompts, empty)
            )
        expected = (unwanted + 3.0 * (wanted - unwanted))[0, :, 0]
        assert torch.allclose(velocity[row], expected, atol=1e-3)


def test_a_stock_pipeline_draws_the_backgrounds_of_captions():
    pipeline = WanPipeline.from_pretrained(EMOJI_TEACHER, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    captions = [caption for caption in emoji.captions(5, 40) if "background" in caption][:4]
    images = pipeline(
        captions,
        num_frames=1,
        height=64,
        width=64,
        num_inference_steps=8,
        guidance_scale=3.0,
        guidance_scale_2=3.0,
        generator=torch.Generator().manual_seed(0),
        output_type="np",
    ).frames[:, 0]
    scenes = map(emoji.read_caption, captions)
    found = [emoji.judge((255 * image).astype(np.uint8), scene) for image, scene in zip(images, scenes)]
    assert np.mean([verdict["background"] for verdict in found]) >= 0.75


@pytest.mark.slow
def test_a_student_trains_on_captions_of_the_emoji_world(tmp_path):
    arguments = ("--teacher", "emoji", "--output_dir", tmp_path / "run", *SHORT_RUN)
    process = run_script(ROOT / "train_distillation.py", *arguments)
    assert process.returncode == 0, process.stderr
    prompts = json.loads((tmp_path / "run" / "run.json").read_text())["validation_prompts"]
    assert all(emoji.is_held_out(emoji.read_caption(prompt)) for prompt in prompts)
    assert (tmp_path / "run" / "diffusion_pytorch_model.safetensors").exists()


def test_the_figures_of_the_teacher_are_recorded_beside_its_weights():
    record = json.loads((EMOJI_TEACHER / "training.json").read_text())
    assert {"autoencoder", "text", "experts", "pipeline"} <= record["figures"].keys()
    assert (EMOJI_TEACHER / "NOTICE").exists()
