"""ComfyUI's single files, and every other way in which a Wan lies on a disk: one teacher trains one student, bit for bit."""

import io
import json
import math
import re
import shutil
from dataclasses import replace

import pytest
import sentencepiece
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, T5TokenizerFast, UMT5Config, UMT5EncoderModel

from tests.conftest import ROOT, official_name, run_script
from tests.test_official import AUTOENCODERS, SMALL, official_autoencoder_name, official_text_encoder_name
from tests.test_resuming import train as train_in_a_process
from train_distillation import Settings, WanLiteStudent, complete, train
from wanlite import shapes
from wanlite.official import check_parts, convert_parts, find_parts, has_two_experts, num_bytes
from wanlite.projection import project_into
from wanlite.stopping import StopSignal
from wanlite.teacher import open_teacher_files

FP8 = torch.float8_e4m3fn
EXPERTS = {"high": "transformer", "low": "transformer_2"}
VERY_SHORT = ("--num_trajectories", "8", "--teacher_steps", "4", "--train_batch_size", "8", "--max_train_steps", "2",
              "--segment_steps", "1", "--matching_steps", "0", "--own_path_pictures", "4", "--num_held_out", "4",
              "--checkpointing_steps", "2", "--validation_steps", "2")
NETWORK = {"num_attention_heads": 1, "attention_head_dim": 128, "num_layers": 2, "ffn_dim": 256, "freq_dim": 32, "text_dim": 64,
           "in_channels": 16, "out_channels": 16, "rope_max_seq_len": 1024}


# ---- a teacher, every number of which float8, times a scale, holds exactly ---------------------------------------------------

def scale_of(tensor):
    """Return a power of two that a tensor is at most fifteen times of: four bits are all that float8 has for a number."""
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
    return in_four_bits(UMT5EncoderModel(UMT5Config(
        vocab_size=64, d_model=width, d_kv=16, d_ff=96, num_layers=2, num_heads=4, dropout_rate=0.0, dtype="bfloat16",
        feed_forward_proj="gated-gelu")).bfloat16())


@pytest.fixture(scope="module")
def spiece():
    """A sentencepiece model as UMT5 has one, trained on the tiny world's captions."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(shapes.captions(0, 400)), model_writer=model, vocab_size=50, pad_id=0, eos_id=1, unk_id=2, bos_id=-1,
        minloglevel=2)
    return model.getvalue()


@pytest.fixture(scope="module")
def wan(tmp_path_factory, spiece):
    """A random teacher of two experts in diffusers' layout: real names, small in every dimension but the head's."""
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
    """Write a tokenizer as google/umt5-xxl has it: sentencepiece's model, of which transformers makes the rest."""
    folder.mkdir()
    (folder / "spiece.model").write_bytes(spiece)
    T5TokenizerFast.from_pretrained(folder, extra_ids=0).save_pretrained(folder)


def tensors_of(wan, part):
    return load_file(next((wan / part).glob("*.safetensors")))


def expert_of(wan, name):
    return {official_name(key): tensor for key, tensor in tensors_of(wan, EXPERTS[name]).items()}


def text_encoder_of(wan):
    return {key: tensor for key, tensor in tensors_of(wan, "text_encoder").items() if "embed_tokens" not in key}


def autoencoder_of(wan):
    config = json.loads((wan / "vae" / "config.json").read_text())
    return {official_autoencoder_name(key, config): tensor.bfloat16() for key, tensor in tensors_of(wan, "vae").items()}


def halved(tensors):
    return {name: tensor.half() for name, tensor in tensors.items()}


def scaled(tensors):
    """Store matrices in float8 beside their scale, the rest in float16, as ComfyUI's fp8_scaled files do."""
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


def write_models(folder, wan, spiece, store=halved, precision="fp16"):
    """Write a teacher as ComfyUI's models/ holds it, the tokenizer inside the text encoder."""
    for name in EXPERTS:
        write(folder / "diffusion_models" / f"wan2.2_t2v_{name}_noise_14B_{precision}.safetensors", store(expert_of(wan, name)))
    words = {"spiece_model": torch.frombuffer(bytearray(spiece), dtype=torch.uint8)}
    write(folder / "text_encoders" / f"umt5_xxl_{precision}.safetensors", store(text_encoder_of(wan)) | words)
    write(folder / "vae" / "wan_2.1_vae.safetensors", autoencoder_of(wan))


def write_flat(folder, wan, spiece):
    """Write all in one folder, in scaled fp8 and with ComfyUI's prefix, the tokenizer beside."""
    for name in EXPERTS:
        write(folder / f"Wan2_2-T2V-A14B-{name.upper()}_fp8_e4m3fn_scaled.safetensors", prefixed(scaled(expert_of(wan, name))))
    write(folder / "umt5_xxl_fp8_e4m3fn_scaled.safetensors", scaled(text_encoder_of(wan)))
    write(folder / "wan_2.1_vae.safetensors", autoencoder_of(wan))
    shutil.copytree(wan / "tokenizer", folder / "tokenizer")


def write_official(folder, wan, spiece):
    """Write Wan's own layout, the experts as shards of its bf16 branch, which has no index."""
    for name in EXPERTS:
        tensors, place = expert_of(wan, name), folder / f"{name}_noise_model"
        for number in (1, 2):
            write(place / f"diffusion_pytorch_model-0000{number}-of-00002-bf16.safetensors",
                  {key: tensors[key].bfloat16() for key in sorted(tensors)[number - 1::2]})
        (place / "config.json").write_text(json.dumps({
            "_class_name": "WanModel", "dim": 128, "ffn_dim": 256, "freq_dim": 32, "in_dim": 16, "num_heads": 1, "num_layers": 2,
            "out_dim": 16, "text_len": 512, "eps": 1e-6, "model_type": "t2v"}))
    torch.save({official_text_encoder_name(key): tensor for key, tensor in text_encoder_of(wan).items()},
               folder / "models_t5_umt5-xxl-enc-bf16.pth")
    torch.save(autoencoder_of(wan), folder / "Wan2.1_VAE.pth")
    shutil.copytree(wan / "tokenizer", folder / "google" / "umt5-xxl")


def write_scaled_models(folder, wan, spiece):
    write_models(folder, wan, spiece, scaled, "fp8_e4m3fn_scaled")


LAYOUTS = {"official": (write_official, "official"), "models fp16": (write_models, "ComfyUI"), "flat fp8": (write_flat, "ComfyUI"),
           "models fp8": (write_scaled_models, "ComfyUI")}


# ---- the same student ---------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    """Flags of a very short run, with prompts whose words the tokenizer knows."""
    prompts = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    prompts.write_text("\n".join(shapes.captions(1, 100)))
    return ("--prompts", prompts, "--resolution", "32", *VERY_SHORT)


@pytest.fixture(scope="module")
def reference(wan, flags, tmp_path_factory):
    folder = tmp_path_factory.mktemp("reference") / "run"
    code, said = train_in_a_process(folder, "--teacher", wan, *flags)
    assert code == 0, said
    return folder


def results_of(run):
    return {f"{part}{name}": tensor.float() for part in ("", "vae/", "text_encoder/")
            for path in (run / part).glob("*.safetensors") for name, tensor in load_file(path).items()}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_trains_bitwise_the_same_student(layout, wan, spiece, flags, reference, tmp_path):
    write_it, name = LAYOUTS[layout]
    write_it(tmp_path / "teacher", wan, spiece)
    code, said = train_in_a_process(tmp_path / "run", "--teacher", tmp_path / "teacher", *flags)
    assert code == 0 and f"({name} layout, 2 expert(s)" in said, said
    expected, found = results_of(reference), results_of(tmp_path / "run")
    assert len(expected) > 100 and expected.keys() == found.keys()
    assert not [name for name, tensor in expected.items() if not torch.equal(tensor, found[name])]
    runs = [json.loads((run / "run.json").read_text())["settings"]["flow_shift"] for run in (reference, tmp_path / "run")]
    assert runs == [12.0, 12.0]
