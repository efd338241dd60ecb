"""WanLitePipeline: the arguments of diffusers, the defaults of the run, and the images of run_inference.py."""

import json
import shutil
import warnings

import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline
from PIL import Image

from run_inference import main, read_settings
from tests.conftest import TINY_TEACHER, loud_student, run_script
from train_distillation import WanLiteStudent
from wanlite import WanLitePipeline
from wanlite.pipeline import denoising, pack_embeddings, pad_embeddings

PROMPTS = ["a small red ring", "a large blue cross above a small green square on a black background"]


def load(folder, **options):
    pipeline = WanLitePipeline.from_pretrained(folder, **options)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def folder(finished_run):
    return finished_run[0]


@pytest.fixture(scope="module")
def pipeline(folder):
    return load(folder)


@pytest.fixture
def copied_run(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "run", ignore=shutil.ignore_patterns("cache", "checkpoints"))
    return tmp_path / "run"


def seeds(*numbers):
    return [torch.Generator().manual_seed(number) for number in numbers]


def draw(pipeline, prompt=PROMPTS[0], seed=3, **arguments):
    """Return an image (height, width, 3) uint8."""
    return np.asarray(pipeline(prompt, generator=seeds(seed)[0], **arguments).images[0])


# ---- images ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, dtype, arguments",
    [
        ((), None, {}),
        (("--dtype", "float32", "--num_inference_steps", "2"), torch.float32, {"num_inference_steps": 2}),
        (("--dtype", "bfloat16"), torch.bfloat16, {}),
        (("--dtype", "float16"), torch.float16, {}),
        (
            ("--guidance_scale", "2", "--negative_prompt", "blue"),
            None,
            {"guidance_scale": 2.0, "negative_prompt": "blue"},
        ),
    ],
)
def test_images_are_those_of_run_inference(options, dtype, arguments, folder, tmp_path):
    words = [word for prompt in PROMPTS for word in ("--prompt", prompt)]
    main(
        *read_settings(
            ["--model", str(folder), "--output_dir", str(tmp_path), "--seed", "5", *words, *options]
        )
    )
    expected = [np.asarray(Image.open(path)) for path in sorted(tmp_path.glob("0*.png"))]
    images = load(folder, dtype=dtype)(PROMPTS, generator=seeds(5, 6), **arguments).images
    assert len(expected) == 2 and all(map(np.array_equal, images, expected))


def test_defaults_are_the_size_and_steps_of_the_run(pipeline, copied_run):
    (image,) = pipeline(PROMPTS[0]).images
    assert image.size == (64, 64) and pipeline.num_timesteps == 4 and pipeline.guidance_scale == 1
    run = json.loads((copied_run / "run.json").read_text())
    del run["drawing_sha256"]
    changes = {"resolution": [96, 64], "num_inference_steps": 2}
    (copied_run / "run.json").write_text(json.dumps(run | changes))
    changed = load(copied_run)
    assert changed(PROMPTS[0]).images[0].size == (96, 64) and changed.num_timesteps == 2


def test_a_folder_without_a_record_draws_the_same_image(pipeline, copied_run):
    (copied_run / "run.json").unlink()
    bare = load(copied_run)
    image = draw(bare, height=64, width=64, num_inference_steps=4)
    assert np.array_equal(image, draw(pipeline)) and bare._choose(None, None, None, None) == ((512, 512), 20)


def test_defaults_of_a_folder_without_a_record_are_a_warning(copied_run):
    (copied_run / "run.json").unlink()
    pipeline = WanLitePipeline.from_pretrained(copied_run)
    with pytest.warns(
        UserWarning, match=r"no run.json beside the student: its default of 512x64 may not fit"
    ):
        pipeline("a ring", height=64, num_inference_steps=1, output_type="latent")


def test_the_base_student_has_its_own_defaults(folder):
    base = load(folder / "base")
    assert base(PROMPTS[0]).images[0].size == (64, 64)
    assert base.num_timesteps == json.loads((folder / "base/run.json").read_text())["num_inference_steps"]


def test_a_list_of_prompts_has_several_images_each_in_order(pipeline):
    images = pipeline(PROMPTS, num_images_per_prompt=2, generator=seeds(0, 1, 2, 3)).images
    doubled = [prompt for prompt in PROMPTS for _ in range(2)]
    expected = pipeline(doubled, generator=seeds(0, 1, 2, 3)).images
    assert len(images) == 4 and all(map(np.array_equal, images, expected))
    assert not np.array_equal(images[0], images[1])


def test_one_generator_draws_the_image_of_its_seed_and_then_others(pipeline):
    generator = seeds(3)[0]
    first, second = (np.asarray(pipeline(PROMPTS[0], generator=generator).images[0]) for _ in range(2))
    assert np.array_equal(first, draw(pipeline)) and not np.array_equal(first, second)


@pytest.mark.parametrize("dimensions", [4, 5])
def test_latents_are_the_noise_of_a_seed(dimensions, pipeline):
    noise = torch.randn(1, 16, 8, 8, generator=seeds(3)[0])
    noise = noise.unsqueeze(2) if dimensions == 5 else noise
    assert np.array_equal(pipeline(PROMPTS[0], latents=noise).images[0], draw(pipeline))


def test_embeddings_of_encode_prompt_replace_the_prompt_without_a_text_encoder(folder, pipeline):
    arguments = {"guidance_scale": 2.0, "num_images_per_prompt": 2}
    expected = pipeline(PROMPTS, negative_prompt="blue", generator=seeds(*range(4)), **arguments).images
    embeddings = dict(
        zip(("prompt_embeds", "negative_prompt_embeds"), pipeline.encode_prompt(PROMPTS, "blue"))
    )
    assert embeddings["prompt_embeds"].shape == (2, 512, 64)
    without_text = load(folder, text_encoder=None, tokenizer=None)
    images = without_text(**embeddings, generator=seeds(*range(4)), **arguments).images
    assert all(map(np.array_equal, images, expected))
    with pytest.raises(ValueError, match="no text encoder: pass prompt_embeds"):
        without_text("a ring")


def test_output_types_hold_the_same_image(pipeline):
    images = {
        kind: pipeline(PROMPTS[0], generator=seeds(3), output_type=kind).images
        for kind in ("pil", "np", "pt", "latent")
    }
    assert images["np"].shape == (1, 64, 64, 3) and images["pt"].shape == (1, 3, 64, 64)
    assert np.array_equal(images["pt"].permute(0, 2, 3, 1).numpy(), images["np"])
    assert np.array_equal((images["np"][0] * 255).round(), np.asarray(images["pil"][0]))
    assert images["latent"].shape == (1, 16, 8, 8)
    pixels = pipeline.decode(images["latent"])
    assert torch.equal(pixels / 2 + 0.5, images["pt"])
    assert isinstance(pipeline(PROMPTS[0], return_dict=False), tuple)


def test_a_callback_sees_and_changes_the_tensors_of_each_step(pipeline):
    seen = []

    def clear_last(pipeline, step, timestep, tensors):
        seen.append((step, sorted(tensors), tensors["latents"].shape))
        if step == pipeline.num_timesteps - 1:
            tensors["latents"] = torch.zeros_like(tensors["latents"])
        return tensors

    names = ["latents", "prompt_embeds"]
    latents = pipeline(
        PROMPTS[0],
        output_type="latent",
        callback_on_step_end=clear_last,
        callback_on_step_end_tensor_inputs=names,
    ).images
    assert seen == [(step, names, (1, 16, 8, 8)) for step in range(4)] and not latents.any()


def test_a_callback_can_exchange_the_prompt_stop_and_end_guidance(pipeline):
    other = pipeline.encode_prompt(PROMPTS[1], do_classifier_free_guidance=False)[0]

    def exchange(pipeline, step, timestep, tensors):
        return {"prompt_embeds": other}

    def stop(pipeline, step, timestep, tensors):
        pipeline._interrupt = step == 1
        return {}

    def end_guidance(pipeline, step, timestep, tensors):
        pipeline._guidance_scale = 1.0
        return {}

    changed = draw(pipeline, callback_on_step_end=exchange)
    assert not np.array_equal(changed, draw(pipeline))
    calls = []
    handle = pipeline.transformer.register_forward_hook(lambda *_: calls.append(1))
    draw(pipeline, callback_on_step_end=stop)
    assert len(calls) == 2
    draw(pipeline, callback_on_step_end=end_guidance, guidance_scale=2.0)
    assert len(calls) == 2 + 5
    handle.remove()


def test_padded_embeddings_are_packed_to_their_true_lengths():
    rows = [torch.randn(length, 4) for length in (3, 512, 1)]
    text = pack_embeddings(pad_embeddings(rows))
    assert torch.equal(pad_embeddings(rows)[0, :3], rows[0])
    assert (text.logit_bias == 0).sum(1).tolist() == [3, 512, 1]


@pytest.mark.parametrize("is_preferred", [True, False])
def test_self_attention_uses_cudnn_on_gpus_that_prefer_it(is_preferred, pipeline, monkeypatch):
    monkeypatch.setattr(denoising, "prefers_cudnn_attention", lambda capability: is_preferred)
    draw(pipeline)
    for block in pipeline.transformer.blocks:
        assert [block.attn1.processor.has_cudnn, block.attn2.processor.has_cudnn] == [is_preferred, False]


# ---- refusals and warnings ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, words",
    [
        ({}, "Provide either `prompt` or `prompt_embeds`"),
        ({"prompt": []}, "empty list"),
        ({"prompt": "a", "height": 70}, "height 70 is not divisible by 16; the nearest is 64"),
        ({"prompt": "a", "width": "64"}, "width '64' is not divisible by 16"),
        (
            {"prompt": "a", "num_inference_steps": 3},
            "num_inference_steps 3: .* was trained for 1, 2, 4 steps",
        ),
        ({"prompt": "a", "num_inference_steps": 0}, "expected a whole number from 1 to 1000"),
        ({"prompt": "a", "num_images_per_prompt": 0}, "num_images_per_prompt is 0"),
        ({"prompt": "a", "output_type": "jpg"}, "expected one of pil, np, pt, latent"),
        ({"prompt": "a", "num_frames": 81}, "num_frames is 81"),
        ({"prompt": "a", "latents": torch.zeros(2, 16, 8, 8)}, r"expected \(1, 16, height, width\)"),
        ({"prompt": "a", "latents": torch.zeros(1, 16, 8, 8), "height": 80}, "height is 80, but latents"),
        ({"prompt": ["a", "b"], "generator": seeds(0)}, "list of generators of length 1"),
        ({"prompt": "a", "callback_on_step_end_tensor_inputs": ["x"]}, "has to be in"),
        (
            {"prompt": ["a", "b"], "negative_prompt": ["c"], "guidance_scale": 2.0},
            "1 negative prompts for 2 prompts",
        ),
    ],
)
def test_unusable_arguments_are_refused(arguments, words, pipeline):
    with pytest.raises(ValueError, match=words):
        pipeline(**arguments)


def test_an_untrained_size_and_a_long_prompt_are_warnings(pipeline):
    with pytest.warns(UserWarning, match="trained at 64 x 64; .*The nearest .* is width=64, height=64"):
        pipeline("a ring", height=80)
    with pytest.warns(UserWarning, match="prompts truncated to the limit of 512 tokens: 1"):
        pipeline("a red ring " * 300)


def test_images_that_are_not_finite_are_errors(folder):
    broken = load(folder)
    with torch.no_grad():
        broken.transformer.proj_out.bias += float("nan")
    with pytest.raises(FloatingPointError, match="not finite in torch.float32: 2 of 2, first number 0"):
        broken(["a", "b"])


def test_folders_without_a_student_are_refused(copied_run, tmp_path):
    with pytest.raises(ValueError, match="holds a pipeline of two experts"):
        WanLitePipeline.from_pretrained(TINY_TEACHER)
    with pytest.raises(OSError, match="no such folder"):
        WanLitePipeline.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="variant=fp16"):
        WanLitePipeline.from_pretrained(copied_run, variant="fp16")
    with pytest.raises(ValueError, match="digest|sha256"):
        WanLitePipeline.from_pretrained(copied_run, sha256="0" * 64)
    path = copied_run / "scheduler/scheduler_config.json"
    config = json.loads(path.read_text())
    for changes in ({"_class_name": "DDIMScheduler", "use_flow_sigmas": None}, {"flow_shift": 5.0}):
        path.write_text(json.dumps(config | changes))
        with pytest.raises(ValueError, match="as the student was trained"):
            WanLitePipeline.from_pretrained(copied_run)
    shutil.rmtree(copied_run / "vae")
    with pytest.raises(OSError, match="lacks vae"):
        WanLitePipeline.from_pretrained(copied_run)


# ---- saving and loading ------------------------------------------------------------------------------------


def test_a_saved_pipeline_has_the_same_defaults_and_images(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path / "saved")
    index = json.loads((tmp_path / "saved/model_index.json").read_text())
    assert index["_class_name"] == "WanPipeline"
    assert index["transformer"] == ["diffusers", "WanTransformer3DModel"]
    again = load(tmp_path / "saved")
    assert np.array_equal(draw(again), draw(pipeline)) and again.record == pipeline.record
    assert type(again.transformer) is WanLiteStudent
    settings, _ = read_settings(["--model", str(tmp_path / "saved"), "--prompt", "a ring"])
    assert settings.num_inference_steps == 4 and settings.height == 64


def test_stock_diffusers_loads_a_run_and_a_saved_pipeline_quietly(folder, pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path / "saved")
    code = (
        "import sys, torch; from diffusers import DiffusionPipeline\n"
        "for folder in sys.argv[1:]:\n"
        "    pipeline = DiffusionPipeline.from_pretrained(folder)\n"
        "    pipeline.set_progress_bar_config(disable=True)\n"
        "    frames = pipeline('a ring', height=64, width=64, num_frames=1, guidance_scale=1.0,\n"
        "        num_inference_steps=4, output_type='np', generator=torch.Generator().manual_seed(3)).frames\n"
        "    print(type(pipeline).__name__, round(float(frames.mean()), 5), 'wanlite' in sys.modules)"
    )
    process = run_script("-c", code, folder, tmp_path / "saved", cwd="/")
    mean = float(pipeline("a ring", generator=seeds(3), output_type="np").images.mean())
    assert process.returncode == 0, process.stderr
    assert process.stdout.splitlines() == [f"WanPipeline {round(mean, 5)} False"] * 2
    lines = filter(None, map(str.strip, process.stderr.splitlines()))
    assert not [line for line in lines if not line.startswith("Loading ")]  # progress bars


@pytest.mark.parametrize("options", [{}, {"variant": "bf16"}])  # with a variant, diffusers loads components
def test_loading_and_drawing_give_no_warning(options, folder, tmp_path):
    load(folder).save_pretrained(tmp_path, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        draw(load(tmp_path, dtype=torch.bfloat16, **options))


def test_another_scheduler_is_saved_and_loaded(folder, tmp_path):
    changed = load(folder)
    changed.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    changed.save_pretrained(tmp_path)
    assert type(load(tmp_path).scheduler) is FlowMatchEulerDiscreteScheduler
    assert np.array_equal(draw(load(tmp_path)), draw(changed))


def test_components_and_dtypes_are_passed_as_in_diffusers(folder):
    student = loud_student(**json.loads((folder / "run.json").read_text())["student"])
    vae = AutoencoderKLWan.from_pretrained(folder / "vae")
    passed = load(folder, transformer=student, vae=vae)
    assert passed.transformer is student and passed.vae is vae
    loaded = load(folder, dtype={"transformer": torch.bfloat16, "default": torch.float16})
    assert [loaded.transformer.dtype, loaded.vae.dtype, loaded.text_encoder.dtype] == [
        torch.bfloat16,
        torch.float16,
        torch.float16,
    ]
    assert load(folder, torch_dtype=torch.bfloat16).vae.dtype == torch.float32


def test_a_variant_is_loaded(folder, tmp_path):
    load(folder, dtype=torch.bfloat16).save_pretrained(tmp_path, variant="bf16")
    loaded = load(tmp_path, variant="bf16", dtype=torch.bfloat16)
    assert np.array_equal(draw(loaded), draw(load(folder, dtype=torch.bfloat16)))


def test_a_name_on_the_hub_is_found_in_the_cache(copied_run, tmp_path):
    cache = tmp_path / "hub/models--someone--student"
    (cache / "refs").mkdir(parents=True)
    (cache / "refs/main").write_text("0123abc")
    (cache / "snapshots").mkdir()
    copied_run.rename(cache / "snapshots/0123abc")
    loaded = load("someone/student", cache_dir=tmp_path / "hub", local_files_only=True)
    assert loaded.name_or_path == "someone/student" and draw(loaded).shape == (64, 64, 3)
    with pytest.raises(OSError, match="someone/other: no such folder here, and not available on the hub"):
        load("someone/other", cache_dir=tmp_path / "hub", local_files_only=True)


# ---- changes to components ---------------------------------------------------------------------------------


def test_a_stock_pipeline_becomes_one_of_this_class(folder, pipeline):
    stock = WanPipeline.from_pretrained(folder)
    made = WanLitePipeline.from_pipe(stock)
    made.set_progress_bar_config(disable=True)
    image = draw(made, height=64, width=64, num_inference_steps=4)
    assert np.abs(image.astype(int) - draw(pipeline)).max() <= 1  # the stock network pads the text
    assert WanLitePipeline.from_pipe(pipeline).record == pipeline.record


def test_a_lora_changes_the_images_until_it_is_unloaded(folder, pipeline):
    pytest.importorskip("peft")
    adapted = load(folder)
    generator = seeds(0)[0]
    layer = "transformer.blocks.0.attn1.to_q"
    adapted.load_lora_weights(
        {
            f"{layer}.lora_A.weight": torch.randn(4, 64, generator=generator),
            f"{layer}.lora_B.weight": torch.randn(64, 4, generator=generator),
        }
    )
    changed = draw(adapted)
    assert not np.array_equal(changed, draw(pipeline))
    assert np.array_equal(draw(adapted, attention_kwargs={"scale": 0.0}), draw(pipeline))
    adapted.unload_lora_weights()
    assert np.array_equal(draw(adapted), draw(pipeline))


def offload_by_layer(pipeline):
    for name in ("text_encoder", "transformer", "vae"):
        cpu_offload(getattr(pipeline, name), torch.device("cpu"), offload_buffers=True)


@pytest.mark.parametrize(
    "offload",
    [
        lambda pipeline: pipeline.enable_model_cpu_offload(device="cpu"),
        offload_by_layer,
        lambda pipeline: pipeline.enable_group_offload(torch.device("cpu"), offload_type="leaf_level"),
    ],
)
def test_offloading_draws_the_same_images(offload, folder, pipeline):
    offloaded = load(folder)
    offload(offloaded)
    for _ in range(2):
        assert np.array_equal(draw(offloaded), draw(pipeline))


def test_tiles_and_changed_weights_of_the_autoencoder_are_used(folder, pipeline):
    changed = load(folder)
    changed.vae.enable_tiling()
    assert np.abs(draw(changed).astype(int) - draw(pipeline)).max() <= 1
    changed.vae.disable_tiling()
    with torch.no_grad():
        changed.vae.decoder.conv_out.weight.zero_()
    assert draw(changed).std(axis=(0, 1)).max() == 0
