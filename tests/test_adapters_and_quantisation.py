"""LoRA and quantisation through diffusers: a student behaves as a stock Wan with the same weights.

Runs if peft and torchao are installed: pip install peft torchao.
"""

import shutil
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from diffusers import WanPipeline, WanTransformer3DModel
from safetensors.torch import load_file

from tests.conftest import official_name
from train_distillation import WanLiteStudent
from wanlite.flow import seeded_noise
from wanlite.generation.student import StudentPipeline
from wanlite.pipeline import WanLitePipeline

PROMPT = "a small red circle at the left on a white background"
LAYERS = [
    *(f"attn{number}.to_{part}" for number in (1, 2) for part in ("q", "k", "v", "out.0")),
    "ffn.net.0.proj",
    "ffn.net.2",
]
RANK = 4

needs_peft = pytest.mark.skipif(not find_spec("peft"), reason="needs peft")
needs_torchao = pytest.mark.skipif(not find_spec("torchao"), reason="needs torchao")


@pytest.fixture
def run(finished_run, tmp_path):
    shutil.copytree(finished_run[0], tmp_path / "run", ignore=shutil.ignore_patterns("cache", "checkpoints"))
    return tmp_path / "run"


def pipelines(run, change=None):
    """Return a pipeline with a student and a stock one with the same weights; `change` is applied to both
    transformers.
    """
    found = []
    for load in (WanLiteStudent, WanTransformer3DModel):
        transformer = load.from_pretrained(run)
        if change:
            change(transformer)
        found.append(WanPipeline.from_pretrained(run, transformer=transformer))
        found[-1].set_progress_bar_config(disable=True)
    return found


def velocity(transformer):
    latents, text = seeded_noise((16, 1, 8, 8), [1, 2]), seeded_noise((512, 64), [3, 4])
    with torch.no_grad():
        return transformer(latents, torch.tensor([900.0, 300.0]), text).sample


def generate(pipeline):
    return pipeline(
        PROMPT,
        height=64,
        width=64,
        num_frames=1,
        guidance_scale=1.0,
        num_inference_steps=2,
        latents=seeded_noise((16, 1, 8, 8), [5]),
        output_type="np",
    ).frames


def near(first, second):
    return np.allclose(np.asarray(first), np.asarray(second), atol=1e-5)


# ---- LoRA --------------------------------------------------------------------------------------------------


def adapter(run, seed=0):
    """Return {(layer, "A" or "B"): matrix} of an adapter on every layer that all dialects support."""
    weights, generator = (
        load_file(run / "diffusion_pytorch_model.safetensors"),
        torch.Generator().manual_seed(seed),
    )
    matrices = {}
    for layer in (f"blocks.{block}.{name}" for block in range(4) for name in LAYERS):
        rows, columns = weights[f"{layer}.weight"].shape
        matrices[layer, "A"] = torch.randn(RANK, columns, generator=generator) / columns**0.5
        matrices[layer, "B"] = torch.randn(rows, RANK, generator=generator) / 10
    return matrices


def diffusers_dialect(matrices):
    return {f"transformer.{layer}.lora_{side}.weight": matrix for (layer, side), matrix in matrices.items()}


def comfyui_dialect(matrices):
    return {
        f"diffusion_model.{official_name(layer)}.lora_{side}.weight": matrix
        for (layer, side), matrix in matrices.items()
    }


def comfyui_dialect_with_alpha(matrices):
    """Halve the adapter: alpha / rank is 1/2."""
    sides = {"A": "lora_down", "B": "lora_up"}
    names = {f"diffusion_model.{official_name(layer)}" for layer, _ in matrices}
    adapted = {
        f"diffusion_model.{official_name(layer)}.{sides[side]}.weight": matrix
        for (layer, side), matrix in matrices.items()
    }
    return adapted | {f"{name}.alpha": torch.tensor(RANK / 2) for name in names}


def kohya_dialect(matrices):
    names = {layer: f"lora_unet_{official_name(layer).replace('.', '_')}" for layer, _ in matrices}
    sides = {"A": "lora_down", "B": "lora_up"}
    return {f"{names[layer]}.{sides[side]}.weight": matrix for (layer, side), matrix in matrices.items()} | {
        f"{name}.alpha": torch.tensor(float(RANK)) for name in names.values()
    }


@needs_peft
@pytest.mark.parametrize(
    "dialect", [diffusers_dialect, comfyui_dialect, comfyui_dialect_with_alpha, kohya_dialect]
)
def test_an_adapter_in_every_dialect_changes_a_student_like_a_stock_wan(dialect, run):
    (ours, stock), matrices = pipelines(run), adapter(run)
    without = velocity(ours.transformer)
    for pipeline in (ours, stock):  # scales the matrices in place
        pipeline.load_lora_weights({name: matrix.clone() for name, matrix in dialect(matrices).items()})
    found = velocity(ours.transformer)
    assert near(found, velocity(stock.transformer)) and not near(found, without)
    assert near(generate(ours), generate(stock))
    scale = 0.5 if dialect is comfyui_dialect_with_alpha else 1.0
    merged = WanLiteStudent.from_pretrained(run)
    with torch.no_grad():
        for (layer, side), matrix in matrices.items():
            if side == "A":
                merged.get_parameter(f"{layer}.weight").add_(scale * matrices[layer, "B"] @ matrix)
    assert np.allclose(found, velocity(merged), atol=1e-4)  # and equals the product of the matrices


@needs_peft
def test_adapters_are_combined_disabled_and_removed_as_on_a_stock_wan(run):
    ours, stock = pipelines(run)
    without, found = velocity(ours.transformer), {}
    for pipeline in (ours, stock):
        for seed, name in enumerate(("first", "second")):
            pipeline.load_lora_weights(kohya_dialect(adapter(run, seed)), adapter_name=name)
        found[pipeline] = []
        for names, weights in ((["first"], [1.0]), (["first", "second"], [0.7, -0.4]), (["second"], [0.2])):
            pipeline.set_adapters(names, weights)
            found[pipeline].append(velocity(pipeline.transformer))
        pipeline.delete_adapters("first")
        found[pipeline].append(velocity(pipeline.transformer))
        pipeline.disable_lora()
        assert near(velocity(pipeline.transformer), without)
        pipeline.enable_lora()
        pipeline.unload_lora_weights()
        assert (
            torch.equal(velocity(pipeline.transformer), velocity(WanLiteStudent.from_pretrained(run)))
            or pipeline is stock
        )
    assert all(near(one, two) for one, two in zip(found[ours], found[stock]))


@needs_peft
def test_a_fused_adapter_is_saved_used_and_unfused(run, tmp_path):
    pipeline, _ = pipelines(run)
    without = velocity(pipeline.transformer)
    pipeline.load_lora_weights(comfyui_dialect(adapter(run)))
    adapted = velocity(pipeline.transformer)
    for fuse in (False, True):
        if fuse:
            pipeline.fuse_lora()
        with pytest.raises(
            ValueError,
            match=r"an adapter in blocks.0.attn1.to_k \(base_layer\) and in 39 more layers. Fuse it",
        ):
            pipeline.transformer.save_pretrained(run)
    assert near(velocity(WanLiteStudent.from_pretrained(run)), without)  # the previous student stays
    pipeline.unfuse_lora()
    assert near(velocity(pipeline.transformer), adapted)
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    pipeline.transformer.save_pretrained(run)
    pipeline.save_pretrained(tmp_path / "pipeline")
    for loaded in (
        WanLiteStudent.from_pretrained(run),
        WanTransformer3DModel.from_pretrained(run),
        StudentPipeline(run).student,
        WanPipeline.from_pretrained(tmp_path / "pipeline").transformer,
    ):
        assert np.allclose(velocity(loaded), adapted, atol=1e-4)


@needs_peft
def test_an_adapter_trained_on_a_student_is_saved_alone_and_loads_again(run, tmp_path):
    from peft import LoraConfig, get_peft_model_state_dict

    student = WanLiteStudent.from_pretrained(run)
    layers = ["to_q", "to_k", "to_v", "to_out.0"]
    student.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=layers, init_lora_weights=False))
    adapted = velocity(student)
    student.save_lora_adapter(tmp_path / "adapter")
    WanPipeline.save_lora_weights(
        tmp_path / "pipeline", transformer_lora_layers=get_peft_model_state_dict(student)
    )
    for folder, named in (("adapter", {"prefix": None}), ("pipeline", {})):
        again = WanLiteStudent.from_pretrained(run)
        again.load_lora_adapter(
            str(tmp_path / folder), weight_name="pytorch_lora_weights.safetensors", **named
        )
        assert near(velocity(again), adapted)
    for pipeline in pipelines(run):
        pipeline.load_lora_weights(str(tmp_path / "pipeline"), weight_name="pytorch_lora_weights.safetensors")
        assert near(velocity(pipeline.transformer), adapted)


# ---- quantisation ------------------------------------------------------------------------------------------


def quantise(kind):
    def change(transformer):
        from torchao import quantization

        config = getattr(quantization, kind)
        quantization.quantize_(transformer, config())

    return change


@needs_torchao
@pytest.mark.parametrize(
    "kind", ["Int8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig", "Float8WeightOnlyConfig"]
)
def test_a_quantised_student_equals_a_quantised_stock_wan_and_is_not_saved(kind, run):
    ours, stock = pipelines(run, quantise(kind))
    found = velocity(ours.transformer)
    assert near(found, velocity(stock.transformer)) and not near(
        found, velocity(WanLiteStudent.from_pretrained(run))
    )
    assert near(generate(ours), generate(stock))
    before = (run / "diffusion_pytorch_model.safetensors").read_bytes()
    with pytest.raises(
        ValueError, match=r"not saved, found quantised weights in blocks.0.attn1.to_k \(\w+\) and in 45 more"
    ):
        ours.transformer.save_pretrained(run)
    assert (run / "diffusion_pytorch_model.safetensors").read_bytes() == before


@needs_torchao
def test_a_stock_pipeline_quantises_a_saved_student_at_loading(run):
    from diffusers import PipelineQuantizationConfig, TorchAoConfig
    from torchao.quantization import Int8WeightOnlyConfig

    config = PipelineQuantizationConfig(quant_mapping={"transformer": TorchAoConfig(Int8WeightOnlyConfig())})
    pipeline = WanPipeline.from_pretrained(run, quantization_config=config)
    pipeline.set_progress_bar_config(disable=True)
    assert (
        type(pipeline.transformer.blocks[0].attn1.to_q.weight).__name__ == "Int8Tensor"
        and np.isfinite(generate(pipeline)).all()
    )


@needs_torchao
def test_our_classes_quantise_a_student_at_loading_as_stock_does(run):
    from diffusers import PipelineQuantizationConfig, TorchAoConfig
    from torchao.quantization import Int8WeightOnlyConfig

    config, dtype = TorchAoConfig(Int8WeightOnlyConfig()), torch.bfloat16
    student = WanLiteStudent.from_pretrained(run, quantization_config=config, dtype=dtype)
    stock = WanTransformer3DModel.from_pretrained(run, quantization_config=config, dtype=dtype)
    kinds = {name: type(weight).__name__ for name, weight in stock.named_parameters()}
    assert {name: type(weight).__name__ for name, weight in student.named_parameters()} == kinds
    assert "Int8Tensor" in kinds.values() and student.is_quantized
    for (name, found), expected in zip(student.named_parameters(), stock.parameters()):
        if kinds[name] == "Int8Tensor":
            found, expected = found.dequantize(), expected.dequantize()
        assert found.dtype == expected.dtype and torch.equal(found, expected), name
    mapping = {"transformer": config}
    options = {"quantization_config": PipelineQuantizationConfig(quant_mapping=mapping), "dtype": dtype}
    pipeline = WanLitePipeline.from_pretrained(run, **options)
    assert type(pipeline.transformer.blocks[0].attn1.to_q.weight).__name__ == "Int8Tensor"
    assert np.asarray(pipeline(PROMPT).images[0]).std() > 1
    with pytest.raises(ValueError, match="not saved, found quantised weights"):
        student.save_pretrained(run)


@pytest.mark.parametrize(
    "config, error, words",
    [
        ({"quant_method": "torchao"}, (ImportError, ValueError), "torchao|quantization_config"),
        ("int8", ValueError, "quantization_config is 'int8', expected a config of diffusers"),
        ({}, ValueError, "quantization_config is {}, expected"),
        ({"quant_method": "other"}, ValueError, "expected a config of diffusers"),
        (8, ValueError, "quantization_config is 8, expected"),
    ],
)
def test_a_quantization_config_that_cannot_be_used_is_refused(config, error, words, run):
    with pytest.raises(error, match=words):
        WanLiteStudent.from_pretrained(run, quantization_config=config)


@needs_peft
@needs_torchao
def test_a_quantised_student_takes_an_adapter(run):
    ours, stock = pipelines(run, quantise("Int8WeightOnlyConfig"))
    for pipeline in (ours, stock):
        pipeline.load_lora_weights(kohya_dialect(adapter(run)))
    assert near(velocity(ours.transformer), velocity(stock.transformer))
    with pytest.raises(
        ValueError, match="found an adapter in .*; quantised weights in .* Fuse it .* Save the student before"
    ):
        ours.transformer.save_pretrained(run)
