"""Image-to-image and inpainting: an image enters at an inner level of the schedule, and a mask keeps its places."""

import numpy as np
import pytest
import torch
from diffusers import WanPipeline
from PIL import Image

from run_inference import main, read_settings
from tests.conftest import ROOT
from tests.test_command_lines import read_refusal
from tests.test_pipeline import PROMPTS, draw, load, seeds
from wanlite.flow import add_noise, sample, seeded_noise
from wanlite.pipeline.editing import shrink_mask
from wanlite.schedule import first_step
from wanlite.world import shapes

SHAPE = (16, 8, 8)


@pytest.fixture(scope="module")
def pipeline(finished_run):
    return load(finished_run[0])


@pytest.fixture(scope="module")
def base(finished_run):
    return load(finished_run[0] / "base")


@pytest.fixture(scope="module")
def image():
    """Return an image (height, width, 3) uint8 of the tiny world."""
    return shapes.draw(shapes.read_caption("at the left, a small red ring on white"))


@pytest.fixture
def mask():
    """Return a mask (height, width) whose right half is repainted."""
    mask = np.zeros((64, 64), np.uint8)
    mask[:, 32:] = 255
    return mask


def encoded(pipeline, image):
    return pipeline.encode(torch.from_numpy(image).permute(2, 0, 1)[None] / 127.5 - 1)


# ---- steps -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "num_steps, strength, expected",
    [
        (4, 0.01, 3),
        (4, 0.25, 3),
        (4, 0.5, 2),
        (4, 0.6, 2),
        (4, 0.625, 1),
        (4, 0.99, 1),
        (4, 1, 0),
        (2, 0.3, 1),
        (1, 1.0, 0),
        (20, 0.6, 8),
        (20, 0.5, 10),
    ],
)
def test_the_remaining_steps_are_the_share_of_the_strength(num_steps, strength, expected):
    assert first_step(num_steps, strength) == expected


@pytest.mark.parametrize("strength", [0, -0.5, 1.01, float("nan"), "0.5", True, None])
def test_a_strength_out_of_range_is_refused(strength):
    with pytest.raises(ValueError, match="expected a number above 0, at most 1"):
        first_step(4, strength)


def test_a_single_step_has_no_inner_level(pipeline, image):
    with pytest.raises(ValueError, match="a single step starts from noise alone"):
        pipeline(PROMPTS[0], image=image, strength=0.5, num_inference_steps=1)


# ---- image-to-image ----------------------------------------------------------------------------------------


def test_an_image_takes_the_last_steps_from_its_noised_latents(pipeline, image):
    noise = seeded_noise(SHAPE, [3])
    embedding = pipeline.encode_prompt(PROMPTS[1], do_classifier_free_guidance=False)[0]
    pipeline.scheduler.set_timesteps(4)
    start = add_noise(encoded(pipeline, image), noise, pipeline.scheduler.sigmas[2:3])

    def velocity_of(latents, timestep):
        return pipeline.transformer(latents, timestep, embedding).sample

    with torch.no_grad():
        expected = sample(velocity_of, start, pipeline.scheduler, 4, begin=2)
    found = pipeline(PROMPTS[1], image=image, strength=0.5, latents=noise, output_type="latent").images
    assert torch.allclose(found, expected, atol=1e-4) and pipeline.num_timesteps == 2


def test_a_strength_of_one_without_a_mask_draws_from_noise_alone(pipeline, image):
    assert np.array_equal(draw(pipeline, image=image, strength=1), draw(pipeline))


def test_a_smaller_strength_stays_closer_to_the_image(base, image):
    errors = [
        np.abs(draw(base, image=image, strength=strength).astype(float) - image).mean()
        for strength in (0.15, 0.5, 1)
    ]
    assert errors[0] < errors[1] < errors[2]


def test_an_image_may_be_of_pillow_an_array_or_a_tensor(pipeline, image):
    tensor = torch.from_numpy(image).permute(2, 0, 1) / 255
    forms = [Image.fromarray(image), image / 255, tensor, tensor[None], [Image.fromarray(image)]]
    expected = draw(pipeline, image=image)
    for form in forms:
        assert np.array_equal(draw(pipeline, image=form), expected)


def test_each_prompt_may_have_an_image_of_its_own(pipeline, image):
    other = image[:, ::-1].copy()
    arguments = {"num_images_per_prompt": 2, "output_type": "pt"}
    found = pipeline(PROMPTS, image=[image, other], generator=seeds(0, 1, 2, 3), **arguments).images
    for number, (prompt, source) in enumerate(zip(np.repeat(PROMPTS, 2), (image, image, other, other))):
        alone = pipeline(str(prompt), image=source, generator=seeds(number), output_type="pt").images
        assert torch.allclose(found[number], alone[0], atol=1e-4)


def test_a_tiled_autoencoder_encodes_the_same_latents(finished_run, pipeline, image):
    tiled = load(finished_run[0])
    tiled.vae.enable_tiling()
    assert torch.allclose(encoded(tiled, image), encoded(pipeline, image), atol=1e-4)


def test_an_offloaded_pipeline_changes_the_same_image(finished_run, pipeline, image):
    from accelerate import cpu_offload

    offloaded = load(finished_run[0])
    for name in ("vae", "transformer", "text_encoder"):
        cpu_offload(getattr(offloaded, name))
    assert np.array_equal(draw(offloaded, image=image), draw(pipeline, image=image))


# ---- inpainting --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_places_that_the_mask_keeps_have_the_latents_of_the_image(strength, pipeline, base, image, mask):
    for each in (pipeline, base):
        found = each(
            PROMPTS[1],
            image=image,
            mask_image=mask,
            strength=strength,
            generator=seeds(3)[0],
            output_type="latent",
        ).images
        kept = encoded(each, image)
        assert torch.allclose(found[..., :4], kept[..., :4], atol=1e-6)
        assert not torch.allclose(found[..., 4:], kept[..., 4:], atol=1e-2)


def test_kept_places_are_noised_to_the_level_of_each_step(pipeline, image, mask):
    noise, found = seeded_noise(SHAPE, [3]), []

    def collect(pipeline, step, timestep, tensors):
        found.append(tensors["latents"])
        return {}

    pipeline(
        PROMPTS[0], image=image, mask_image=mask, strength=1, latents=noise, callback_on_step_end=collect
    )
    levels = pipeline.scheduler.sigmas[1:]
    expected = [add_noise(encoded(pipeline, image), noise, level[None]) for level in levels]
    assert len(found) == 4
    assert all(torch.equal(one[..., :4], two[..., :4]) for one, two in zip(found, expected))


def test_a_white_mask_changes_all_and_a_black_mask_nothing(pipeline, image):
    white, black = np.full((64, 64), 255, np.uint8), np.zeros((64, 64), np.uint8)
    assert np.array_equal(draw(pipeline, image=image, mask_image=white), draw(pipeline, image=image))
    latents = pipeline(PROMPTS[0], image=image, mask_image=black, output_type="latent").images
    assert torch.equal(latents, encoded(pipeline, image))


def test_masks_of_every_form_are_equal(pipeline, image, mask):
    expected = draw(pipeline, image=image, mask_image=mask)
    tensor = torch.from_numpy(mask) / 255
    forms = [
        Image.fromarray(mask),
        mask > 0,
        mask[..., None],
        tensor,
        tensor[None, None],
        Image.fromarray(mask).convert("RGB"),
    ]
    for form in forms:
        assert np.array_equal(draw(pipeline, image=image, mask_image=form), expected)


def test_a_latent_place_is_repainted_if_one_of_its_pixels_is():
    mask = torch.zeros(1, 1, 64, 64)
    mask[..., 15, 8] = 1
    assert shrink_mask(mask, (8, 8)).nonzero().tolist() == [[0, 0, 1, 1]]


# ---- refusals ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, words",
    [
        ({"image": np.zeros((48, 64, 3), np.uint8)}, "image is 64 x 48, expected 64 x 64. Resize it"),
        ({"image": np.zeros((64, 64, 4), np.uint8)}, r"shape \(64, 64, 4\), expected \(height, width, 3\)"),
        ({"image": np.full((64, 64, 3), 2.0)}, "values from 2 to 2, expected 0 to 1"),
        ({"image": np.full((64, 64, 3), np.nan)}, "values from nan to nan"),
        ({"image": np.zeros((0, 64, 64, 3))}, "has the shape"),
        ({"image": "photo.png"}, "image is str, expected a PIL image"),
        ({"image": np.full((64, 64, 3), None)}, "image is an array of object"),
        ({"image": []}, "image is an empty list"),
        ({"image": np.zeros((3, 64, 64, 3))}, "3 images for 1 prompts"),
        ({"mask_image": np.zeros((64, 64))}, "mask_image is given without an image"),
        ({"image": np.zeros((64, 64, 3)), "mask_image": np.zeros((32, 32))}, "mask_image is 32 x 32"),
        ({"image": np.zeros((64, 64, 3)), "mask_image": np.zeros((2, 64, 64))}, "2 masks for 1 images"),
        ({"image": np.zeros((64, 64, 3)), "strength": 0}, "strength is 0, expected"),
    ],
)
def test_unusable_images_are_refused(arguments, words, pipeline):
    with pytest.raises(ValueError, match=words):
        pipeline("a ring", **arguments)


@pytest.fixture
def files(tmp_path, image, mask):
    Image.fromarray(image).save(tmp_path / "image.png")
    Image.fromarray(mask).save(tmp_path / "mask.png")
    Image.fromarray(image).resize((32, 64)).save(tmp_path / "narrow.png")
    (tmp_path / "broken.png").write_bytes((tmp_path / "image.png").read_bytes()[:200])
    Image.new("1", (20_000, 20_000)).save(tmp_path / "huge.png")
    return tmp_path


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--image", "missing.png"], "--image missing.png: cannot be read (No such file"),
        (["--image", "."], "--image .: not a regular file"),
        (["--image", "broken.png"], "--image broken.png: not a complete JPEG, PNG or WebP"),
        (["--image", "huge.png"], "--image huge.png: "),
        (["--image", "narrow.png"], "--image narrow.png is 32 x 64, expected 64 x 64. Resize it"),
        (["--image", "image.png", "--mask", "narrow.png"], "--mask narrow.png is 32 x 64, expected 64 x 64"),
        (["--image", "image.png", "--strength", "0"], "--strength is 0.0, expected a number above 0"),
        (["--image", "image.png", "--strength", "1.5"], "--strength is 1.5, expected"),
        (["--image", "image.png", "--num_inference_steps", "1"], "starts from noise alone"),
        (["--mask", "mask.png"], "--mask is used with --image only"),
        (["--strength", "0.5"], "--strength is used with --image only"),
    ],
)
def test_unusable_files_are_refused_in_one_line(arguments, words, files, finished_run, monkeypatch, capsys):
    monkeypatch.chdir(files)
    with pytest.raises(SystemExit) as ended:
        read_settings(["--model", str(finished_run[0]), "--output_dir", "images", *arguments])
    printed = capsys.readouterr().err
    assert ended.value.code == 2 and words in printed and len(printed.splitlines()) == 1
    assert not (files / "images").exists()


def test_a_missing_image_ends_the_script_with_one_line(finished_run, tmp_path):
    script = ROOT / "run_inference.py"
    assert "cannot be read" in read_refusal(script, "--model", finished_run[0], "--image", tmp_path / "a.png")


# ---- the command line --------------------------------------------------------------------------------------


def test_the_command_line_draws_the_images_of_the_pipeline_and_records_them(
    files, finished_run, pipeline, image, mask, capsys
):
    arguments = ["--image", str(files / "image.png"), "--mask_image", str(files / "mask.png")]
    options = ["--model", str(finished_run[0]), "--output_dir", str(files / "out"), "--seed", "5"]
    words = [
        "--num_images_per_prompt",
        "2",
        "--batch_size",
        "1",
        "--dtype",
        "float32",
        "--prompt",
        PROMPTS[0],
    ]
    main(*read_settings([*options, *arguments, *words]))
    printed = capsys.readouterr().out
    assert "image.png in the last 2 of 4 steps, from a noise level of 0.75" in printed
    paths = sorted((files / "out").glob("0*.png"))
    for seed, path in zip((5, 6), paths, strict=True):
        with Image.open(path) as drawn:
            expected = draw(pipeline, seed=seed, image=image, mask_image=mask)
            assert np.array_equal(np.asarray(drawn), expected)
            assert drawn.text["strength"] == "0.6"
            assert {len(drawn.text[name]) for name in ("image_sha256", "mask_image_sha256")} == {64}
            assert str(files) not in str(drawn.text)


# ---- guidance of the student before the few-step phase -----------------------------------------------------


def test_base_draws_with_guidance_and_a_negative_prompt_as_a_stock_pipeline(finished_run, base, tmp_path):
    folder = finished_run[0] / "base"
    guided = {"guidance_scale": 3.0, "negative_prompt": "a large blue cross"}
    image = draw(base, **guided)
    for changes in ({}, {"guidance_scale": 3.0}, guided | {"guidance_scale": 1.0}):
        assert not np.array_equal(draw(base, **changes), image)
    stock = WanPipeline.from_pretrained(folder)
    stock.set_progress_bar_config(disable=True)
    frames = stock(
        PROMPTS[0],
        height=64,
        width=64,
        num_frames=1,
        num_inference_steps=8,
        latents=seeded_noise(SHAPE, [3]).unsqueeze(2),
        output_type="np",
        **guided,
    ).frames
    assert np.abs(frames[0][0] * 255 - image).max() < 2
    arguments = ["--model", str(folder), "--output_dir", str(tmp_path), "--seed", "3", "--prompt", PROMPTS[0]]
    flags = ["--guidance_scale", "3", "--negative_prompt", guided["negative_prompt"], "--dtype", "float32"]
    main(*read_settings([*arguments, *flags]))
    (path,) = tmp_path.glob("0*.png")
    with Image.open(path) as drawn:
        assert np.array_equal(np.asarray(drawn), image)
        assert (drawn.text["guidance_scale"], drawn.text["negative_prompt"]) == ("3.0", "a large blue cross")
