"""ComfyUI's single files and all other layouts of a Wan: one teacher trains the same student from each,
bit for bit.
"""

import io
import json
import math
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
import sentencepiece
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, T5TokenizerFast, UMT5Config, UMT5EncoderModel

from tests.conftest import A14B, TI2V_5B, WAN_1_3B, official_name, wan_shapes, write_sparse
from tests.test_official import AUTOENCODERS, SMALL, official_autoencoder_name, official_text_encoder_name
from tests.test_resuming import train as train_in_a_process
from tests.test_teacher_files import WRAPPERS, hide_files_in, wrap
from train_distillation import Settings, WanLiteStudent, plan, train
from wanlite.planning.resolve import complete
from wanlite.runtime.signals import StopSignal
from wanlite.student.initialization import project_into
from wanlite.teacher.checkpoint import open_teacher_files
from wanlite.teacher.components import convert_components, find_components, num_bytes
from wanlite.world import shapes

OVERCOMMIT = Path("/proc/sys/vm/overcommit_memory")
FP8 = torch.float8_e4m3fn
EXPERTS = {"high": "transformer", "low": "transformer_2"}
VERY_SHORT = {
    "num_trajectories": 8,
    "teacher_steps": 4,
    "train_batch_size": 8,
    "max_train_steps": 2,
    "few_step_train_steps": 1,
    "rollout_states": 4,
    "num_held_out": 4,
    "checkpointing_steps": 2,
    "validation_steps": 2,
}
NETWORK = {
    "num_attention_heads": 1,
    "attention_head_dim": 128,
    "num_layers": 2,
    "ffn_dim": 256,
    "freq_dim": 32,
    "text_dim": 64,
    "in_channels": 16,
    "out_channels": 16,
    "rope_max_seq_len": 1024,
}


def settings_in(folder, **more):
    """Return the settings of a very short run with the teacher wan/ in a folder and the output run/
    there.
    """
    return Settings(
        teacher=str(folder / "wan"),
        output_dir=str(folder / "run"),
        report_to="none",
        **{"resolution": 32} | VERY_SHORT | more,
    )


# ---- a teacher that scaled float8 represents exactly -------------------------------------------------------


def scale_of(tensor):
    """Return a power of two such that the tensor is at most fifteen times as large: float8 has four
    significant bits.
    """
    return 2.0 ** math.ceil(math.log2(tensor.abs().max().item() / 15 or 1))


@torch.no_grad()
def in_four_bits(network):
    for tensor in network.state_dict().values():
        tensor.copy_((tensor / scale_of(tensor)).round() * scale_of(tensor))
    return network


def make_network(seed, **changes):
    torch.manual_seed(seed)
    return in_four_bits(WanTransformer3DModel(**NETWORK | changes))


def make_text_encoder(seed=0, width=64):
    torch.manual_seed(seed)
    return in_four_bits(
        UMT5EncoderModel(
            UMT5Config(
                vocab_size=64,
                d_model=width,
                d_kv=16,
                d_ff=96,
                num_layers=2,
                num_heads=4,
                dropout_rate=0.0,
                dtype="bfloat16",
                feed_forward_proj="gated-gelu",
            )
        ).bfloat16()
    )


@pytest.fixture(scope="module")
def spiece():
    """A sentencepiece model of UMT5's kind, trained on captions of the tiny world."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(shapes.captions(0, 400)),
        model_writer=model,
        vocab_size=50,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    return model.getvalue()


@pytest.fixture(scope="module")
def wan(tmp_path_factory, spiece):
    """A random teacher of two experts in the diffusers layout: real names, small in every dimension
    except the head size.
    """
    folder = tmp_path_factory.mktemp("wan") / "diffusers"
    for seed, name in enumerate(EXPERTS.values()):
        make_network(seed).save_pretrained(folder / name)
    torch.manual_seed(2)
    in_four_bits(AutoencoderKLWan(**SMALL)).save_pretrained(folder / "vae")
    make_text_encoder().save_pretrained(folder / "text_encoder")
    write_tokenizer(folder / "tokenizer", spiece)
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text('{"flow_shift": 12.0}')
    return folder


def write_tokenizer(folder, spiece):
    """Write a tokenizer as in google/umt5-xxl: the sentencepiece model, from which transformers builds
    the rest.
    """
    folder.mkdir()
    (folder / "spiece.model").write_bytes(spiece)
    T5TokenizerFast.from_pretrained(folder, extra_ids=0).save_pretrained(folder)


def tensors_of(wan, part):
    return load_file(next((wan / part).glob("*.safetensors")))


def expert_of(wan, name):
    return {official_name(key): tensor for key, tensor in tensors_of(wan, EXPERTS[name]).items()}


def text_encoder_of(wan):
    return {
        key: tensor for key, tensor in tensors_of(wan, "text_encoder").items() if "embed_tokens" not in key
    }


def autoencoder_of(wan):
    config = json.loads((wan / "vae" / "config.json").read_text())
    return {
        official_autoencoder_name(key, config): tensor.bfloat16()
        for key, tensor in tensors_of(wan, "vae").items()
    }


def halved(tensors):
    return {name: tensor.half() for name, tensor in tensors.items()}


def scaled(tensors):
    """Store matrices in float8 beside their scales and the rest in float16, as in ComfyUI's fp8_scaled
    files.
    """
    stored = {"scaled_fp8": torch.zeros(2, dtype=FP8)}
    for name, tensor in tensors.items():
        is_scaled = tensor.ndim == 2 and name.startswith(("blocks.", "encoder.block."))
        stored[name] = (tensor.float() / scale_of(tensor)).to(FP8) if is_scaled else tensor.half()
        if is_scaled:
            stored[name.removesuffix("weight") + "scale_weight"] = torch.tensor(scale_of(tensor))
    return stored


def prefixed(tensors):
    return {f"model.diffusion_model.{name}": tensor for name, tensor in tensors.items()}


def write(path, tensors):
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)


def write_models(folder, wan, spiece):
    """Write a teacher in the layout of ComfyUI's models/, the tokenizer inside the text encoder."""
    for name in EXPERTS:
        write(
            folder / "diffusion_models" / f"wan2.2_t2v_{name}_noise_14B_fp16.safetensors",
            halved(expert_of(wan, name)),
        )
    words = {"spiece_model": torch.frombuffer(bytearray(spiece), dtype=torch.uint8)}
    write(folder / "text_encoders" / "umt5_xxl_fp16.safetensors", halved(text_encoder_of(wan)) | words)
    write(folder / "vae" / "wan_2.1_vae.safetensors", autoencoder_of(wan))


def write_flat(folder, wan, spiece):
    """Write all files into one folder, in scaled fp8 with ComfyUI's prefix, the tokenizer beside them."""
    for name in EXPERTS:
        write(
            folder / f"Wan2_2-T2V-A14B-{name.upper()}_fp8_e4m3fn_scaled.safetensors",
            prefixed(scaled(expert_of(wan, name))),
        )
    write(folder / "umt5_xxl_fp8_e4m3fn_scaled.safetensors", scaled(text_encoder_of(wan)))
    write(folder / "wan_2.1_vae.safetensors", autoencoder_of(wan))
    shutil.copytree(wan / "tokenizer", folder / "tokenizer")


def write_official(folder, wan, spiece):
    """Write Wan's own layout, with the experts as shards of its bf16 branch, which has no index."""
    for name in EXPERTS:
        tensors, place = expert_of(wan, name), folder / f"{name}_noise_model"
        for number in (1, 2):
            write(
                place / f"diffusion_pytorch_model-0000{number}-of-00002-bf16.safetensors",
                {key: tensors[key].bfloat16() for key in sorted(tensors)[number - 1 :: 2]},
            )
        (place / "config.json").write_text(
            json.dumps(
                {
                    "_class_name": "WanModel",
                    "dim": 128,
                    "ffn_dim": 256,
                    "freq_dim": 32,
                    "in_dim": 16,
                    "num_heads": 1,
                    "num_layers": 2,
                    "out_dim": 16,
                    "text_len": 512,
                    "eps": 1e-6,
                    "model_type": "t2v",
                }
            )
        )
    torch.save(
        {official_text_encoder_name(key): tensor for key, tensor in text_encoder_of(wan).items()},
        folder / "models_t5_umt5-xxl-enc-bf16.pth",
    )
    torch.save(autoencoder_of(wan), folder / "Wan2.1_VAE.pth")
    shutil.copytree(wan / "tokenizer", folder / "google" / "umt5-xxl")


LAYOUTS = {
    "official": (write_official, "official"),
    "models fp16": (write_models, "ComfyUI"),
    "flat fp8": (write_flat, "ComfyUI"),
}


# ---- every layout trains the same student ------------------------------------------------------------------


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    """Flags of a very short run, with prompts in the vocabulary of the tokenizer."""
    prompts = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    prompts.write_text("\n".join(shapes.captions(1, 100)))
    return (
        "--matching_steps",
        0,
        "--prompts",
        prompts,
        *(word for name, value in VERY_SHORT.items() for word in (f"--{name}", value)),
    )


@pytest.fixture(scope="module")
def reference(wan, flags, tmp_path_factory):
    folder = tmp_path_factory.mktemp("reference") / "run"
    code, printed = train_in_a_process(folder, "--teacher", wan, "--resolution", 32, *flags)
    assert code == 0, printed
    return folder


def results_of(run):
    return {
        f"{part}{name}": tensor.float()
        for part in ("", "vae/", "text_encoder/")
        for path in (run / part).glob("*.safetensors")
        for name, tensor in load_file(path).items()
    }


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_trains_bitwise_the_same_student(layout, wan, spiece, flags, reference, tmp_path):
    write_it, name = LAYOUTS[layout]
    write_it(tmp_path / "teacher", wan, spiece)
    code, printed = train_in_a_process(
        tmp_path / "run", "--teacher", tmp_path / "teacher", "--resolution", 32, *flags
    )
    assert code == 0 and f"{name} layout, 2 experts of" in printed, printed
    expected, found = results_of(reference), results_of(tmp_path / "run")
    assert len(expected) > 100 and expected.keys() == found.keys()
    assert not [name for name, tensor in expected.items() if not torch.equal(tensor, found[name])]
    runs = [
        json.loads((run / "run.json").read_text())["settings"]["flow_shift"]
        for run in (reference, tmp_path / "run")
    ]
    assert runs == [3.0, 3.0]  # of the size; the scheduler of the diffusers layout has 12


def test_every_layout_projects_the_same_student_with_a_fingerprint_of_its_own(wan, spiece, tmp_path):
    initializations, fingerprints = [], set()
    for layout, (write_it, _) in LAYOUTS.items():
        write_it(tmp_path / layout, wan, spiece)
    for folder in (wan, *(tmp_path / layout for layout in LAYOUTS)):
        student = WanLiteStudent(hidden_size=64, depth=2, num_heads=1, ffn_dim=128, text_dim=64, freq_dim=32)
        project_into(student, folder, "low")
        initializations.append(student.state_dict())
        fingerprints.add(open_teacher_files(folder).fingerprint)
        assert len(open_teacher_files(folder).experts) == 2
    assert all(
        torch.equal(tensor, start[name])
        for start in initializations[1:]
        for name, tensor in initializations[0].items()
    )
    path = next((tmp_path / "models fp16" / "diffusion_models").glob("*low_noise*"))
    write(path, {name: -tensor for name, tensor in load_file(path).items()})
    fingerprints.add(open_teacher_files(tmp_path / "models fp16").fingerprint)
    assert len(fingerprints) == len(LAYOUTS) + 2


@pytest.mark.parametrize(
    "high, low",
    [
        ("wan22T2VHighNoise_v1", "wan22T2VLowNoise_v1"),
        ("wan_hn", "wan_ln"),
        ("14B-HN-fp16", "14B-LN-fp16"),
        ("high-noise", "low-noise"),
        ("wan_high_", "wan_low_"),
        ("t2vHIGHNOISE", "t2vLOWNOISE"),
        ("A14BhighNoise", "A14BlowNoise"),
        ("wan22High", "wan22Low"),
        ("Wan2.2/fp16/wan_high_noise", "Wan2.2/fp16/wan_low_noise"),
        ("Wan2.2/high_noise/model", "Wan2.2/low_noise/model"),
    ],
)
def test_two_experts_are_found_under_any_usual_name_and_in_subfolders(high, low, wan, spiece, tmp_path):
    write_models(tmp_path, wan, spiece)
    for name, new in (("high", high), ("low", low)):
        path = tmp_path / "diffusion_models" / f"{new}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        next((tmp_path / "diffusion_models").rglob(f"wan2.2_t2v_{name}_noise_14B*")).rename(path)
    (tmp_path / "diffusion_models" / "loop").symlink_to(tmp_path)
    experts = open_teacher_files(tmp_path).experts
    assert experts["high"].folder.stem == Path(high).name and experts["low"].folder.stem == Path(low).name


@pytest.mark.parametrize(
    "name", ["wan_slow_noise", "wan_flow_shift", "wan_highres", "WanHighres", "yellow", "film_lnx"]
)
def test_a_word_that_merely_contains_high_or_low_names_no_expert(name, wan, tmp_path):
    write(tmp_path / "diffusion_models" / f"{name}.safetensors", halved(expert_of(wan, "low")))
    assert list(open_teacher_files(tmp_path).experts) == ["only"]


def test_files_in_a_subfolder_are_used_only_if_there_are_no_others(wan, spiece, tmp_path):
    write_models(tmp_path, wan, spiece)
    expected = (
        find_components(tmp_path),
        [expert.folder for expert in open_teacher_files(tmp_path).experts.values()],
    )
    for part in ("diffusion_models", "text_encoders", "vae"):
        shutil.copytree(tmp_path / part, tmp_path / "x")
        (tmp_path / "x").rename(tmp_path / part / "old")
    assert (
        find_components(tmp_path),
        [expert.folder for expert in open_teacher_files(tmp_path).experts.values()],
    ) == expected
    for path in (*expected[1], expected[0]["vae"], expected[0]["text_encoder"]):
        path.unlink()
    assert (
        find_components(tmp_path)["vae"].parent.name == "old"
        and len(open_teacher_files(tmp_path).experts) == 2
    )


@pytest.mark.parametrize("prefix, infix", WRAPPERS)
def test_wrapper_prefixes_in_the_names_of_single_files_are_stripped(prefix, infix, wan, spiece, tmp_path):
    write_flat(tmp_path, wan, spiece)  # in scaled fp8, with ComfyUI's prefix
    for path in tmp_path.glob("*.safetensors"):
        change(
            path,
            lambda tensors: {
                name.removeprefix("model.diffusion_model."): tensor for name, tensor in tensors.items()
            },
        )
        wrap(path, prefix, infix)
    exact, found = open_teacher_files(wan).experts["high"], open_teacher_files(tmp_path).experts["high"]
    assert all(torch.equal(found.read(name), exact.read(name)) for name in exact.places)
    convert_components(find_components(tmp_path), tmp_path / "parts", lambda _: None)


def test_hidden_files_are_not_files_of_comfyui(wan, spiece, tmp_path):
    write_models(tmp_path, wan, spiece)
    expected = find_components(tmp_path), open_teacher_files(tmp_path).fingerprint
    hide_files_in(tmp_path)
    assert (find_components(tmp_path), open_teacher_files(tmp_path).fingerprint) == expected


def test_single_files_equal_folders_and_are_recognised_by_their_tensor_names(wan, spiece, tmp_path):
    write_models(tmp_path / "wan", wan, spiece)
    files = open_teacher_files(tmp_path / "wan")
    assert list(files.experts) == ["high", "low"] and files.boundary == 0.875
    for name in EXPERTS:
        found, expected = files.experts[name], open_teacher_files(wan).experts[name]
        assert found.config == expected.config and found.places.keys() == expected.places.keys()
        assert all(torch.equal(found.read(key), expected.read(key)) for key in expected.places)


@pytest.mark.parametrize(
    "model, names",
    [
        (A14B, ["wan2.2_t2v_high_noise_14B_fp16", "wan2.2_t2v_low_noise_14B_fp16"]),
        (A14B, ["wan2.1_t2v_14B_fp8_scaled"]),
        (A14B, ["Wan2.2-T2V-A14B-HighNoise", "Wan2.2-T2V-A14B-LowNoise"]),
        (WAN_1_3B, ["wan2.1_t2v_1.3B_fp16"]),
        (TI2V_5B, ["wan2.2_ti2v_5B_fp16"]),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_every_single_file_opens_at_its_real_shape(model, names, tmp_path):
    (tmp_path / "unet").mkdir()
    for name in names:
        write_sparse(
            tmp_path / "unet" / f"{name}.safetensors",
            {official_name(key): shape for key, shape in wan_shapes(**model).items()},
        )
    files = open_teacher_files(tmp_path)
    assert list(files.experts) == (["high", "low"] if len(names) == 2 else ["only"])
    expected = {
        "num_attention_heads": model["width"] // 128,
        "attention_head_dim": 128,
        "num_layers": model["num_layers"],
        "ffn_dim": model["ffn_dim"],
        "in_channels": model["channels"],
        "out_channels": model["channels"],
        "freq_dim": 256,
        "text_dim": 4096,
        "patch_size": (1, 2, 2),
        "eps": 1e-6,
    }
    assert expected.items() <= files.config.items()


@pytest.mark.skipif(
    os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") > 100e9 or OVERCOMMIT.read_text().strip() == "1",
    reason="this machine has, or promises, memory for any file",
)
def test_a_file_too_large_to_map_opens_and_is_refused_when_it_is_read(tmp_path):
    deep = A14B | {"num_layers": 200}  # 282 GB, of which only the header takes disk space
    write_sparse(
        tmp_path / "wan.safetensors", {official_name(key): shape for key, shape in wan_shapes(**deep).items()}
    )
    only = open_teacher_files(tmp_path).experts["only"]
    with pytest.raises(
        OSError, match="wan.safetensors: .* GB cannot be mapped .* official or diffusers layout"
    ):
        only.read("patch_embedding.bias")


# ---- the tokenizer -----------------------------------------------------------------------------------------


def test_the_tokenizer_inside_a_text_encoder_equals_sentencepiece(wan, spiece, tmp_path):
    write_models(tmp_path / "wan", wan, spiece)
    convert_components(find_components(tmp_path / "wan"), tmp_path / "parts", lambda _: None)
    exact = sentencepiece.SentencePieceProcessor(model_proto=spiece, add_eos=True)
    texts = [*shapes.captions(5, 50), "", "A", "Ünï ｆｕｌｌ 漢字 12,5", "a  small\ttriangle "]
    for tokenizer in (
        AutoTokenizer.from_pretrained(tmp_path / "parts" / "tokenizer"),
        T5TokenizerFast.from_pretrained(tmp_path / "parts", subfolder="tokenizer"),
    ):
        assert tokenizer(texts).input_ids == [exact.encode(text) for text in texts]
        padded = tokenizer(["a", "a small circle"], padding=True, return_tensors="pt")
        assert padded.input_ids[0].tolist()[-3:] == [0, 0, 0] and padded.attention_mask[0].tolist()[:2] == [
            1,
            1,
        ]


@pytest.mark.parametrize(
    "content, words",
    [
        (b"\xff\xff no protocol buffer", "spiece_model is not a sentencepiece model"),
        (b"\n\x00", r"begins with \[''\], expected <pad>"),
    ],
)
def test_a_broken_tokenizer_is_refused(content, words, wan, spiece, tmp_path):
    write_models(tmp_path / "wan", wan, content)
    with pytest.raises(ValueError, match=words):
        convert_components(find_components(tmp_path / "wan"), tmp_path / "parts", lambda _: None)
    assert not (tmp_path / "parts" / "tokenizer").exists()


def test_a_folder_without_a_tokenizer_is_refused_with_the_place_for_one(wan, spiece, tmp_path):
    write_flat(tmp_path / "wan", wan, spiece)
    shutil.rmtree(tmp_path / "wan" / "tokenizer")
    with pytest.raises(OSError, match="lacks tokenizer .*tokenizer/, google/umt5-xxl/ or spiece_model"):
        find_components(tmp_path / "wan")


# ---- other Wans --------------------------------------------------------------------------------------------


def write_one_expert(folder, network, layout, name):
    tensors = {official_name(key): tensor for key, tensor in network.state_dict().items()}
    config = network.config
    if layout == "ComfyUI":
        return write(folder / "diffusion_models" / f"{name}_fp16.safetensors", halved(tensors))
    write(folder / "diffusion_pytorch_model.safetensors", tensors)
    (folder / "config.json").write_text(
        json.dumps(
            {
                "_class_name": "WanModel",
                "dim": 128,
                "ffn_dim": config.ffn_dim,
                "freq_dim": config.freq_dim,
                "in_dim": config.in_channels,
                "num_heads": 1,
                "num_layers": config.num_layers,
                "out_dim": config.out_channels,
                "text_len": 512,
                "eps": 1e-6,
            }
        )
    )


class OneExpert(NamedTuple):
    name: str
    layout: str
    channels: int
    autoencoder: str


def write_wan(folder, model, spiece):
    """Write a Wan with one expert in the official or in ComfyUI's layout, without files of another
    layout.
    """
    network = make_network(5, in_channels=model.channels, out_channels=model.channels)
    write_one_expert(folder, network, model.layout, model.name)
    torch.manual_seed(6)
    vae = in_four_bits(AutoencoderKLWan(**AUTOENCODERS[model.autoencoder] | {"num_res_blocks": 1}))
    tensors = {official_autoencoder_name(key, vae.config): tensor for key, tensor in vae.state_dict().items()}
    words = {
        key: tensor for key, tensor in make_text_encoder().state_dict().items() if "embed_tokens" not in key
    }
    if model.layout == "official":
        torch.save(tensors, folder / model.autoencoder)
        torch.save(
            {official_text_encoder_name(key): tensor for key, tensor in words.items()},
            folder / "models_t5_umt5-xxl.pth",
        )
        (folder / "google").mkdir()
        return write_tokenizer(folder / "google" / "umt5-xxl", spiece)
    words = halved(words) | {"spiece_model": torch.frombuffer(bytearray(spiece), dtype=torch.uint8)}
    write(folder / "text_encoders" / "umt5_xxl_fp16.safetensors", words)
    write(folder / "vae" / "wan2.2_vae.safetensors", tensors)
    write(
        folder / "vae" / "wan_2.1_vae.safetensors",
        {  # both are there: the channels of the experts select one
            "conv2.weight": torch.zeros(16, 16, 1, 1, 1),
            "decoder.middle.0.residual.0.gamma": torch.zeros(8),
        },
    )


@pytest.mark.parametrize(
    "model, pixels",
    [
        (OneExpert("wan2.2_ti2v_5B", "ComfyUI", 48, "Wan2.2_VAE.pth"), 32),
        (OneExpert("wan2.1_t2v_1.3B", "official", 16, "Wan2.1_VAE.pth"), 16),
    ],
)
def test_a_wan_with_one_expert_is_planned_and_trains(model, pixels, spiece, flags, capsys, tmp_path):
    write_wan(tmp_path / "wan", model, spiece)
    settings = settings_in(tmp_path, prompts=str(flags[3]))
    with pytest.raises(ValueError, match=f"--resolution {32 + pixels // 2} is not divisible by {pixels}"):
        complete(replace(settings, resolution=32 + pixels // 2))
    assert (
        plan(complete(settings), []) == 0
        and f"{model.layout} layout, one expert of" in capsys.readouterr().out
    )
    assert not (tmp_path / "run").exists()
    code, printed = train_in_a_process(
        tmp_path / "run", "--teacher", tmp_path / "wan", "--resolution", 32, *flags
    )
    assert code == 0, printed
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert run["settings"]["flow_shift"] == 3.0 and run["finished"]
    assert WanLiteStudent.from_pretrained(tmp_path / "run").config.num_channels == model.channels


# ---- rejections with advice --------------------------------------------------------------------------------

HIGH, LOW, WORDS, VAE = (
    "diffusion_models/wan2.2_t2v_high_noise_14B_fp16.safetensors",
    "diffusion_models/wan2.2_t2v_low_noise_14B_fp16.safetensors",
    "text_encoders/umt5_xxl_fp16.safetensors",
    "vae/wan_2.1_vae.safetensors",
)


def change(path, how):
    write(path, how(load_file(path)))


def without(tensors, words):
    return {name: tensor for name, tensor in tensors.items() if words not in name}


def copy_in_fp8(wan, path):
    write(wan / path.replace("fp16", "fp8_scaled"), scaled(load_file(wan / path)))


def become_image_to_video(wan):
    for path in (HIGH, LOW):
        change(
            wan / path, lambda tensors: tensors | {"patch_embedding.weight": torch.zeros(128, 36, 1, 2, 2)}
        )
        (wan / path).rename(wan / path.replace("t2v", "i2v"))


def become_lora(wan):
    (wan / HIGH).unlink()
    write(wan / LOW, {"diffusion_model.blocks.0.ffn.0.lora_A.weight": torch.zeros(4, 128)})


def put_wider_text_encoder(wan):
    words = {
        key: tensor
        for key, tensor in make_text_encoder(width=96).state_dict().items()
        if "embed_tokens" not in key
    }
    write(wan / WORDS, words | {"spiece_model": load_file(wan / WORDS)["spiece_model"]})


def put_other_autoencoder(wan):
    change(wan / VAE, lambda tensors: tensors | {"conv2.weight": torch.zeros(48, 48, 1, 1, 1)})


@pytest.mark.parametrize(
    "damage, words",
    [
        (
            lambda wan: (wan / HIGH).write_bytes((wan / HIGH).read_bytes()[:-1000]),
            "high_noise.*not a complete safetensors.*Download it",
        ),
        (lambda wan: (wan / LOW).write_bytes(b""), "low_noise.*not a complete safetensors.*Download it"),
        (
            lambda wan: (wan / f"{LOW}.aria2").touch(),
            "low_noise.*aria2: an unfinished download. Let it finish",
        ),
        (
            lambda wan: (wan / LOW).write_bytes((wan / LOW).read_bytes() + b"123"),
            "low_noise.*: 3 bytes too long: .*Download it again",
        ),
        (
            lambda wan: (wan / VAE).write_bytes((wan / VAE).read_bytes() + b"123"),
            "wan_2.1_vae.*: 3 bytes too long",
        ),
        (
            lambda wan: (wan / WORDS).rename(wan / "text_encoders/umt5_Q8_0.gguf"),
            "lacks tokenizer .*found umt5_Q8_0.gguf: GGUF is not",
        ),
        (
            lambda wan: (wan / VAE).rename(wan / "vae/Wan2.1_VAE.pth"),
            "lacks vae .*Wan2.1_VAE.pth is in vae/, expected in ",
        ),
        (
            lambda wan: (wan / LOW).rename(wan / "diffusion_models/low.gguf"),
            "no low_noise file .*; found low.gguf: GGUF is not read",
        ),
        (
            lambda wan: [
                (wan / path).rename(wan / f"diffusion_models/{n}.safetensors")
                for n, path in enumerate((HIGH, LOW))
            ],
            "both 0.* and 1.* are distinguished by high and low, high_noise and low_noise, or hn and ln",
        ),
        (
            lambda wan: (wan / LOW).unlink(),
            "high_noise.* is one of two experts, and there is no low_noise file.*Download it into",
        ),
        (
            lambda wan: shutil.copy(wan / LOW, wan / HIGH),
            "hold the same weights, expected two experts. Download",
        ),
        (
            lambda wan: shutil.copy(wan / LOW, wan / "unet_low_noise.safetensors"),
            "both .* in one precision. Put the files",
        ),
        (
            lambda wan: copy_in_fp8(wan, HIGH),
            "both .*fp16.* and .*fp8_scaled.* are text-to-video Wans.*folder of their own",
        ),
        (
            lambda wan: shutil.copy(wan / LOW, wan / "wan2.1_t2v_14B.safetensors"),
            "both .*folder of their own",
        ),
        (
            become_image_to_video,
            "i2v_high_noise.* is an image-to-video or control Wan .channels in: 36.*Choose a text-to-video",
        ),
        (become_lora, "low_noise.* is a LoRA. Choose a text-to-video Wan"),
        (
            lambda wan: change(
                wan / LOW, lambda tensors: tensors | {"vace_blocks.0.before_proj.weight": torch.zeros(8, 8)}
            ),
            "to VACE",
        ),
        (
            lambda wan: change(wan / LOW, lambda tensors: without(tensors, "blocks.1.ffn.2.bias")),
            "those that its first block implies; missing .*blocks.1.ffn.net.2.bias.*download the expert again",
        ),
        (
            lambda wan: copy_in_fp8(wan, WORDS),
            "umt5_xxl_fp16.* and umt5_xxl_fp8_scaled.* could each be its text_encoder.*links will",
        ),
        (
            lambda wan: change(
                wan / WORDS, lambda tensors: without(tensors, "block.1.layer.0.SelfAttention.relative")
            ),
            "lacks tokenizer .*, text_encoder .*umt5_xxl_fp16.safetensors is a T5",
        ),
        (
            put_wider_text_encoder,
            "umt5_xxl_fp16.safetensors: is a umt5 of width 96, .*width 64. Put the text encoder",
        ),
        (put_other_autoencoder, "lacks vae .*wan_2.1_vae.safetensors is another Wan's"),
        (
            lambda wan: (wan / VAE).rename(wan / "vae/qwen_image_vae.safetensors"),
            "lacks vae .*ComfyUI's wan.vae.safetensors",
        ),
        (
            lambda wan: (wan / WORDS).write_bytes((wan / WORDS).read_bytes()[:-9]),
            "umt5.*not a complete safetensors.*Download it again",
        ),
    ],
)
def test_an_impossible_teacher_is_refused_with_advice(damage, words, wan, spiece, tmp_path):
    write_models(tmp_path / "wan", wan, spiece)
    damage(tmp_path / "wan")
    settings = settings_in(tmp_path)
    with pytest.raises((OSError, ValueError), match=words) as refused:
        train(complete(settings), False, StopSignal(()))
    assert "\n" not in str(refused.value) and not (tmp_path / "run").exists()


def test_a_width_of_an_unpublished_wan_is_refused(wan, spiece, tmp_path):
    write_models(tmp_path / "wan", wan, spiece)
    for path in (HIGH, LOW):
        write(
            tmp_path / "wan" / path,
            halved(
                {
                    official_name(key): tensor
                    for key, tensor in make_network(0, attention_head_dim=96).state_dict().items()
                }
            ),
        )
    with pytest.raises(ValueError, match="width of 96, expected a multiple of 128.*config.json"):
        open_teacher_files(tmp_path / "wan")


@pytest.mark.parametrize(
    "part, field, value, words",
    [
        ("vae", "z_dim", 48, "vae: has 48 latent channels, the teacher's experts 16. Put the autoencoder"),
        (
            "text_encoder",
            "d_model",
            32,
            "is a umt5 of width 32, the teacher's experts expect a umt5 of width 64",
        ),
        ("text_encoder", "model_type", "t5", "is a t5 of width 64"),
    ],
)
def test_components_of_another_model_are_refused_in_the_diffusers_layout_too(
    part, field, value, words, wan, tmp_path
):
    shutil.copytree(wan, tmp_path / "wan")
    path = tmp_path / "wan" / part / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    settings = settings_in(tmp_path)
    with pytest.raises(ValueError, match=words):
        plan(complete(settings), [])


@pytest.mark.parametrize(
    "scale, words",
    [
        (torch.tensor(float("nan")), "scale of .* holds nan, expected finite"),
        (torch.zeros(()), "holds 0.0, expected finite numbers"),
        (torch.ones(3), r"the scale of .* is torch.float32 \(3,\)"),
    ],
)
def test_a_text_encoder_with_an_impossible_scale_is_refused(scale, words, wan, spiece, tmp_path):
    write_models(tmp_path / "wan", wan, spiece)
    change(
        tmp_path / "wan" / WORDS,
        lambda tensors: tensors | {"encoder.block.0.layer.0.SelfAttention.q.scale_weight": scale},
    )
    with pytest.raises(ValueError, match=words):
        convert_components(find_components(tmp_path / "wan"), tmp_path / "parts", lambda _: None)


def test_the_bytes_of_a_component_are_those_after_its_conversion(wan, spiece, tmp_path):
    write_flat(tmp_path / "wan", wan, spiece)
    found = find_components(tmp_path / "wan")
    convert_components(found, tmp_path / "parts", lambda _: None)
    for part in ("text_encoder", "vae"):
        assert num_bytes(found[part]) == pytest.approx(num_bytes(tmp_path / "parts" / part), rel=0.1)
