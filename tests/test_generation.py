"""Inference in this process: the files, their metadata, and warnings."""

import hashlib
import json
import os
import shutil
import weakref

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import run_inference
import wanlite.pipeline.decoding
from run_inference import main, read_settings
from tests.conftest import loud_student
from train_distillation import WanLiteStudent
from wanlite.data.grids import CELL, GUTTER, enlarge
from wanlite.data.text_encoder import encode_prompts, load_text_encoder
from wanlite.files.image_files import save_image
from wanlite.files.weights import WeightsFile
from wanlite.generation import images as generated_images
from wanlite.generation import student as loaded_student
from wanlite.generation.images import choose_batch_size, generate_all, save_grid
from wanlite.generation.settings import Settings
from wanlite.generation.student import StudentPipeline
from wanlite.runtime.devices import disable_cudnn_attention, drawing_dtype
from wanlite.training.sampling_defaults import size_warning, trained_sizes

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def copied_run(finished_run, tmp_path):
    shutil.copytree(finished_run[0], tmp_path / "run", ignore=shutil.ignore_patterns("cache", "checkpoints"))
    return tmp_path / "run"


@pytest.fixture(scope="module")
def pipeline(finished_run):
    return StudentPipeline(finished_run[0])


@pytest.fixture
def hooked(pipeline):
    """Register a hook on a module of the pipeline for the duration of a test."""
    handles = []
    yield lambda module, hook: handles.append(getattr(pipeline, module).register_forward_hook(hook))
    for handle in handles:
        handle.remove()


def settings_of(folder, output, prompts, *arguments):
    output.mkdir(exist_ok=True)
    words = [word for prompt in prompts for word in ("--prompt", prompt)]
    return read_settings(["--model", str(folder), "--output_dir", str(output), *words, *arguments])


def flatten(run):
    """Make a run's autoencoder decode everything to one colour."""
    path = run / "vae" / WEIGHTS
    weights = load_file(path)
    save_file(
        {
            name: tensor * 0 if name.startswith("decoder.conv_out") else tensor
            for name, tensor in weights.items()
        },
        path,
    )
    (run / "vae/manifest.json").unlink()


# ---- flat images and values that are not finite ------------------------------------------------------------


def test_flat_images_are_written_and_one_warning_names_them(copied_run, tmp_path, capsys):
    flatten(copied_run)
    main(*settings_of(copied_run, tmp_path / "images", ["a black screen", "fog"]))
    printed = capsys.readouterr()
    assert len(list((tmp_path / "images").glob("*.png"))) == 3
    assert (
        printed.err.count("WARNING") == 1
        and (
            "WARNING: 2 of 2 images are one flat colour: 0000-a-black-screen-seed0.png, 0001-fog-seed1.png. "
            "The likely reason is a prompt unlike those of the training"
        )
        in printed.err
    )


@pytest.mark.parametrize("batch_size", ["1", "3"])
def test_one_flat_image_of_several_gives_no_warning(
    batch_size, finished_run, pipeline, tmp_path, monkeypatch, capsys
):
    images = iter(
        [
            np.arange(192, dtype=np.uint8).reshape(8, 8, 3),
            np.full((8, 8, 3), 7, np.uint8),
            np.arange(192, dtype=np.uint8).reshape(8, 8, 3),
        ]
    )
    monkeypatch.setattr(run_inference, "StudentPipeline", lambda *_: pipeline)
    monkeypatch.setattr(pipeline, "generate", lambda prompts, *_: [next(images) for _ in prompts])
    main(*settings_of(finished_run[0], tmp_path / "images", "abc", "--batch_size", batch_size))
    assert (
        capsys.readouterr().err.splitlines()[-1]
        == "WARNING: 1 of 3 images is one flat colour: 0001-b-seed1.png."
    )


def nan_where(numbers):
    """Return a hook that replaces rows of a module's output by NaN; rows are numbered across calls."""
    seen = iter(range(10**6))

    def hook(module, inputs, output):
        tensor = output[0] if isinstance(output, tuple) else output.sample
        rows = [row for row in range(len(tensor)) if next(seen) in numbers]
        tensor[rows] = float("nan")

    return hook


@pytest.mark.parametrize("module, batch_size", [("student", "3"), ("student", "1")])
def test_images_that_are_not_finite_are_errors_and_the_others_are_saved(
    module, batch_size, finished_run, pipeline, hooked, tmp_path, monkeypatch
):
    monkeypatch.setattr(run_inference, "StudentPipeline", lambda *_: pipeline)
    hooked(module, nan_where({1}))  # with one step, a row is an image
    settings = settings_of(
        finished_run[0], tmp_path / "images", "abc", "--batch_size", batch_size, "--num_inference_steps", "1"
    )
    with pytest.raises(
        FloatingPointError, match=r"1 of 3 images are not finite in float32 and were not written \(seed 1\)"
    ):
        main(*settings)
    assert sorted(path.name for path in (tmp_path / "images").iterdir()) == [
        "0000-a-seed0.png",
        "0001-c-seed2.png",
        "grid-0000-0001.png",
    ]


def test_pixels_that_are_not_finite_are_not_an_image(pipeline, monkeypatch):
    decode = loaded_student.decode_latents
    monkeypatch.setattr(
        loaded_student,
        "decode_latents",
        lambda *each: decode(*each).index_fill(0, torch.tensor([0]), float("inf")),
    )
    first, second = pipeline.generate(["a", "b"], [0, 1], 1, 64, 64)
    assert first is None and second.shape == (64, 64, 3)


# ---- files -------------------------------------------------------------------------------------------------


def test_commands_in_a_row_keep_all_images_and_print_a_line_for_each(finished_run, tmp_path, capsys):
    for prompts in (["a ring", "b"], ["\x1b[2Ja ring " + "x" * 200], ["c", "d", "e"]):
        main(*settings_of(finished_run[0], tmp_path / "images", prompts))
    names = sorted(path.name for path in (tmp_path / "images").iterdir())
    assert [name[:4] for name in names] == ["0000", "0001", "0002", "0003", "0004", "0005", "grid", "grid"]
    assert names[6:] == ["grid-0000-0001.png", "grid-0003-0005.png"]
    lines = [line for line in capsys.readouterr().out.splitlines() if line[:4].isdigit()]
    assert [line.partition("  ")[0] for line in lines] == names[:6]
    assert (
        lines[0].endswith("  a ring")
        and "  \\x1b[2Ja ring xxx" in lines[2]
        and lines[2].endswith("...")
        and len(lines[2]) < 150
    )


def test_a_grid_has_at_most_64_cells_and_no_more_images_are_kept(
    finished_run, pipeline, tmp_path, monkeypatch
):
    image = np.arange(192, dtype=np.uint8).reshape(8, 8, 3)
    monkeypatch.setattr(pipeline, "generate", lambda prompts, *_: [image.copy() for _ in prompts])
    settings, prompts = settings_of(finished_run[0], tmp_path, ["a"] * 100, "--batch_size", "10")
    generated, cells = generate_all(pipeline, settings, prompts)
    assert len(generated) == 100 and len(cells) == 64
    path = save_grid(settings, generated, cells, {"weights_sha256": "digest"})
    grid = Image.open(path)
    assert path.name == "grid-0000-0063.png" and grid.width == GUTTER + 8 * (CELL + GUTTER)
    assert len(json.loads(grid.text["prompts"])) == 64 and grid.text["weights_sha256"] == "digest"


def test_a_grid_shows_prompts_and_a_row_for_each_prompt_with_several_images(finished_run, tmp_path):
    arguments = ("--num_images_per_prompt", "3", "--num_inference_steps", "1")
    main(*settings_of(finished_run[0], tmp_path, ["a ring", "a cross"], *arguments))
    files = sorted(path.name for path in tmp_path.glob("0*.png"))
    grid = Image.open(tmp_path / "grid-0000-0005.png")
    assert json.loads(grid.text["prompts"]) == ["a ring"] * 3 + ["a cross"] * 3
    assert json.loads(grid.text["seeds"]) == [*range(6)] and json.loads(grid.text["files"]) == files
    assert grid.text["num_inference_steps"] == "1" and "prompt" not in grid.text and "seed" not in grid.text
    pixels = np.asarray(grid)
    first, fourth = (np.asarray(Image.open(tmp_path / files[number])) for number in (0, 3))
    assert grid.width == GUTTER + 3 * (CELL + GUTTER)
    assert (pixels[GUTTER : GUTTER + CELL, GUTTER : GUTTER + CELL] == enlarge(first)).all()
    second_row = slice(grid.height // 2 + GUTTER, grid.height // 2 + GUTTER + CELL)
    assert (pixels[second_row, GUTTER : GUTTER + CELL] == enlarge(fourth)).all()
    text = pixels[GUTTER + CELL + 2 : grid.height // 2, GUTTER : GUTTER + CELL]
    assert (text == 0).any() and (pixels[-1] == 255).all()


@pytest.mark.parametrize("batch_size", ["1", "3"])
def test_images_that_cannot_be_written_end_the_command_and_the_images_before_them_stay(
    batch_size, finished_run, tmp_path, monkeypatch
):
    calls = iter(range(8))

    def fail_third(*arguments):
        if next(calls) == 2:
            raise OSError("no space left")
        return save_image(*arguments)

    monkeypatch.setattr(generated_images, "save_image", fail_third)
    settings = settings_of(finished_run[0], tmp_path, "abcdefgh", "--batch_size", batch_size)
    with pytest.raises(OSError, match="no space left"):
        main(*settings)
    assert sorted(path.name[:4] for path in tmp_path.iterdir())[:2] == ["0000", "0001"]


# ---- prompts and batches -----------------------------------------------------------------------------------


def test_eight_images_of_one_prompt_encode_it_once(finished_run, tmp_path, monkeypatch):
    encoded = []

    def encode(tokenizer, encoder, prompts):
        encoded.extend(prompts)
        return encode_prompts(tokenizer, encoder, prompts)

    monkeypatch.setattr(loaded_student, "encode_prompts", encode)
    arguments = ("--num_images_per_prompt", "8", "--batch_size", "3", "--guidance_scale", "2")
    main(*settings_of(finished_run[0], tmp_path, ["a ring", "a cat", "a ring"], *arguments))
    assert encoded == ["a ring", "a cat", ""] and len(list(tmp_path.glob("0*.png"))) == 24


def test_prompts_are_encoded_and_the_encoder_is_freed_before_the_student_is_loaded(
    finished_run, tmp_path, monkeypatch
):
    alive = []

    def load(*arguments):
        tokenizer, encoder = load_text_encoder(*arguments)
        alive.append(weakref.ref(encoder))
        return tokenizer, encoder

    def from_pretrained(*arguments, **options):
        assert len(alive) == 1 and alive[0]() is None
        return student_from_pretrained(*arguments, **options)

    student_from_pretrained = WanLiteStudent.from_pretrained
    monkeypatch.setattr(loaded_student, "load_text_encoder", load)
    monkeypatch.setattr(WanLiteStudent, "from_pretrained", from_pretrained)
    main(*settings_of(finished_run[0], tmp_path, ["a ring"]))
    assert len(alive) == 1


@pytest.mark.parametrize("arguments, expected", [((), "5"), (("--batch_size", "2"), "2")])
def test_images_are_drawn_together_by_default_and_record_the_size_of_the_batch(
    arguments, expected, finished_run, tmp_path
):
    main(*settings_of(finished_run[0], tmp_path, "abcde", *arguments))
    assert Image.open(tmp_path / "0000-a-seed0.png").text["batch_size"] == expected


@pytest.mark.parametrize(
    "device, side, free, expected",
    [
        ("cpu", 64, 10**10, 64),
        ("cpu", 512, 10**10, 1),
        ("cpu", 1024, 10**10, 1),
        ("cuda", 512, 10**11, 16),
        ("cuda", 1024, 10**11, 4),
        ("cuda", 512, 5 * 10**9, 4),
        ("cuda", 512, 10**6, 1),
        ("mps", 64, 10**10, 64),
    ],
)
def test_the_default_batch_size_follows_image_size_device_and_memory(
    device, side, free, expected, monkeypatch
):
    monkeypatch.setattr(generated_images, "free_memory", lambda _: (free, free))
    settings = Settings(height=side, width=side)
    assert choose_batch_size(settings, torch.device(device)) == expected


# ---- sizes -------------------------------------------------------------------------------------------------


def test_an_untrained_size_gives_a_warning_before_and_after(finished_run, tmp_path, capsys):
    settings, prompts = settings_of(finished_run[0], tmp_path, ["a"], "--height", "80", "--width", "96")
    main(settings, prompts)
    printed = capsys.readouterr().err.splitlines()
    warned = [
        line for line in printed if line.startswith("WARNING: the student was trained at 64 x 64; images of ")
    ]
    assert len(warned) == 2 and warned[0].endswith(
        "96 x 80 may fail. The nearest trained size is --width 64 --height 64."
    )


@pytest.mark.parametrize(
    "run, expected",
    [
        ({}, []),
        ({"resolution": 512}, [(512, 512)]),
        ({"resolution": [96, 64], "settings": {"aspect_ratios": None}}, [(96, 64)]),
        (
            {"resolution": [96, 64], "settings": {"aspect_ratios": ["3:2", "1:1", "2:3"]}},
            [(96, 64), (80, 80), (64, 96)],
        ),
    ],
)
def test_trained_sizes_come_from_the_record_of_the_run(run, expected):
    assert trained_sizes(run, 16, "run.json") == expected


def test_a_trained_size_gives_no_warning_and_the_nearest_is_named():
    sizes = [(96, 64), (80, 80), (64, 96)]
    assert all(size_warning(size, sizes) is None for size in sizes) and size_warning((512, 512), []) is None
    assert "--width 64 --height 96" in size_warning((48, 112), sizes)
    assert "--width 80 --height 80" in size_warning((512, 512), sizes)


@pytest.mark.parametrize(
    "run",
    [
        {"resolution": "64"},
        {"resolution": [64, None]},
        {"resolution": {}},
        {"resolution": True},
        {"resolution": 64, "settings": {"aspect_ratios": [1]}},
        {"resolution": 64, "settings": {"aspect_ratios": "3:2"}},
        {"resolution": 64, "settings": {"aspect_ratios": ["9:1"]}},
    ],
)
def test_a_record_without_sizes_is_refused_by_name(run):
    with pytest.raises(ValueError, match="run.json: "):
        trained_sizes(run, 16, "run.json")


# ---- hashes of weights -------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_replaced", [True, False])
def test_the_hash_in_an_image_is_that_of_the_weights_that_generated_it(is_replaced, copied_run, tmp_path):
    digest = hashlib.sha256((copied_run / WEIGHTS).read_bytes()).hexdigest()
    pipeline = StudentPipeline(copied_run)
    before = pipeline.generate(["a ring"], [0], 1, 64, 64)[0]
    other = {name: tensor + 0.1 for name, tensor in load_file(copied_run / WEIGHTS).items()}
    save_file(other, tmp_path / "other", {"config": WeightsFile(copied_run / WEIGHTS).metadata["config"]})
    (os.replace if is_replaced else shutil.copyfile)(tmp_path / "other", copied_run / WEIGHTS)
    settings, prompts = settings_of(copied_run, tmp_path / "images", ["a ring"], "--num_inference_steps", "1")
    (generated,), (image,) = generate_all(pipeline, settings, prompts)
    assert Image.open(generated.path).text["weights_sha256"] == digest and np.array_equal(image, before)
    assert StudentPipeline(copied_run).weights_sha256 != digest


def test_a_pinned_model_is_pinned_whole(copied_run):
    pipeline = StudentPipeline(copied_run)
    for digest in (pipeline.weights_sha256, pipeline.model_sha256, pipeline.model_sha256.upper()):
        assert StudentPipeline(copied_run, sha256=digest)
    for name in ("tokenizer/tokenizer.json", "text_encoder/config.json", "vae/config.json"):
        path = copied_run / name
        content = path.read_text()
        path.write_text(f"{content}\n")
        (path.parent / "manifest.json").rename(copied_run / "aside")
        with pytest.raises(ValueError, match="not the pinned model"):
            StudentPipeline(copied_run, sha256=pipeline.model_sha256)
        path.write_text(content)
        (copied_run / "aside").rename(path.parent / "manifest.json")
    assert StudentPipeline(copied_run, sha256=pipeline.model_sha256)


def test_an_image_names_its_model_without_a_path(copied_run, tmp_path):
    main(*settings_of(copied_run, tmp_path / "images", ["a ring"]))
    text = Image.open(next((tmp_path / "images").iterdir())).text
    assert text["model"] == copied_run.name and len(text["model_sha256"]) == 64
    assert not any(str(tmp_path) in value for value in text.values())


def test_a_hash_is_of_the_bytes_read_even_if_the_file_changes_meanwhile(tmp_path):
    loud_student(hidden_size=64, depth=2, num_heads=2).save_pretrained(tmp_path)
    content = (tmp_path / WEIGHTS).read_bytes()
    with WeightsFile(tmp_path / WEIGHTS) as file:
        header, read = content[: 8 + int.from_bytes(content[:8], "little")], []
        for _, tensor in file.tensors(is_hashed=True):
            if not read:
                with open(tmp_path / WEIGHTS, "r+b") as other:  # in place, while it is read
                    other.write(bytes(len(content)))
            read.append(tensor.view(-1).view(torch.uint8).numpy().tobytes())
        assert (
            file.sha256
            == hashlib.sha256(header + b"".join(read)).hexdigest()
            != hashlib.sha256(content).hexdigest()
        )


def test_a_student_in_memory_does_not_change_with_its_file(tmp_path):
    student = loud_student(hidden_size=64, depth=2, num_heads=2)
    student.save_pretrained(tmp_path)
    digest = hashlib.sha256((tmp_path / WEIGHTS).read_bytes()).hexdigest()
    plain, pinned = (WanLiteStudent.from_pretrained(tmp_path, sha256=each) for each in (None, digest))
    hashed, loaded = WanLiteStudent.from_pretrained(tmp_path, output_loading_info=True)
    with open(tmp_path / WEIGHTS, "r+b") as file:
        file.write(b"\xff" * (tmp_path / WEIGHTS).stat().st_size)
        file.truncate(100)
    assert loaded["sha256"] == {WEIGHTS: digest}
    for each in (plain, pinned, hashed):
        assert all(
            torch.equal(tensor, student.state_dict()[name]) for name, tensor in each.state_dict().items()
        )


# ---- dtype and attention -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "device_type, has_bfloat16, expected",
    [
        ("cuda", True, "bfloat16"),
        ("cuda", False, "float32"),
        ("cpu", True, "float32"),
        ("cpu", False, "float32"),
        ("mps", True, "float32"),
        ("xpu", True, "float32"),
    ],
)
def test_inference_uses_bfloat16_only_on_gpus_that_support_it(device_type, has_bfloat16, expected):
    assert drawing_dtype(device_type, has_bfloat16) == expected


@pytest.mark.parametrize("arguments, expected", [((), "float32"), (("--dtype", "bfloat16"), "bfloat16")])
def test_an_image_records_the_dtype_that_generated_it(arguments, expected, finished_run, tmp_path):
    main(*settings_of(finished_run[0], tmp_path, ["a ring"], *arguments))
    assert Image.open(tmp_path / "0000-a-ring-seed0.png").text["dtype"] == expected


def test_a_gpu_with_bfloat16_uses_it_by_default(finished_run, monkeypatch):
    monkeypatch.setattr(loaded_student, "drawing_dtype", lambda *_: drawing_dtype("cuda", True))
    assert (
        StudentPipeline(finished_run[0]).dtype == torch.bfloat16
        and StudentPipeline(finished_run[0], dtype="float16").dtype == torch.float16
    )


@pytest.mark.parametrize(
    "dtype, is_fast, expected",
    [
        ("bfloat16", True, torch.bfloat16),
        ("bfloat16", False, torch.float32),
        ("float32", True, torch.float32),
        ("float16", True, torch.float32),
    ],
)
def test_images_are_decoded_in_bfloat16_if_it_was_chosen_and_is_fast(
    dtype, is_fast, expected, finished_run, monkeypatch
):
    monkeypatch.setattr(wanlite.pipeline.decoding, "is_fast_in_bfloat16", lambda _: is_fast)
    pipeline = StudentPipeline(finished_run[0], dtype=dtype).pipeline
    assert pipeline.single_frame_autoencoder("cpu").dtype == expected


def test_cudnn_attention_is_off_in_inference_and_training(finished_run, monkeypatch):
    for choose in (disable_cudnn_attention, lambda: StudentPipeline(finished_run[0])):
        torch.backends.cuda.enable_cudnn_sdp(True)
        choose()
        assert not torch.backends.cuda.cudnn_sdp_enabled()


def test_a_student_without_a_record_generates_the_same_images(copied_run, tmp_path):
    """The same holds after stock diffusers has saved its scheduler again."""
    first = StudentPipeline(copied_run).generate(["a ring"], [0], 2, 64, 64)[0]
    StudentPipeline(copied_run).pipeline.scheduler.save_pretrained(copied_run / "scheduler")
    (copied_run / "run.json").unlink()
    assert np.array_equal(first, StudentPipeline(copied_run).generate(["a ring"], [0], 2, 64, 64)[0])
    assert "flow_prediction" in json.dumps(dict(StudentPipeline(copied_run).pipeline.scheduler.config))
