"""The teacher, opened: both layouts, both dialects, routing at the boundary, guidance."""

import json
import shutil

import pytest
import torch
from diffusers import WanTransformer3DModel

from tests.conftest import TINY_TEACHER, official_name
from wanlite.network import unpack_text
from wanlite.teacher import Teacher, diffusers_name, open_teacher_files


@pytest.fixture(scope="module")
def stock():
    return {name: WanTransformer3DModel.from_pretrained(TINY_TEACHER / folder).eval()
            for name, folder in (("high", "transformer"), ("low", "transformer_2"))}


def test_every_diffusers_name_survives_the_way_to_the_official_dialect_and_back(stock):
    names = list(stock["high"].state_dict())
    official = [official_name(name) for name in names]
    assert len(set(official)) == len(names) == 27 * 4 + 15
    assert [diffusers_name(name) for name in official] == names == [diffusers_name(name) for name in names]
    assert diffusers_name("model.diffusion_model.blocks.3.norm3.weight") == "blocks.3.norm2.weight"
    assert diffusers_name("head.modulation") == "scale_shift_table"


@pytest.mark.parametrize("name", ["blocks.0.attn3.to_q.weight", "xblocks.0.modulation", "img_emb.proj.0.weight", ""])
def test_a_name_that_no_wan_has_is_an_error(name):
    with pytest.raises(ValueError, match="is no tensor"):
        diffusers_name(name)


def test_both_layouts_hold_the_same_teacher(official_teacher, teacher, words, noisy):
    official = Teacher(open_teacher_files(official_teacher))
    assert official.files.layout == "official" and teacher.files.layout == "diffusers"
    assert official.boundary == teacher.boundary == 0.875
    timestep = torch.tensor([990.0, 875.0, 874.0, 30.0])
    ours, theirs = (each.velocity(noisy, timestep, *words, 4.0, 3.0)[0] for each in (teacher, official))
    assert torch.equal(ours, theirs)


def test_guided_velocity_is_what_two_stock_networks_and_classifier_free_guidance_give(teacher, stock, words, noisy):
    text, negative = (unpack_text(each) for each in words)
    timestep = torch.tensor([999.0, 875.0, 874.9, 20.0])
    velocity, _ = teacher.velocity(noisy, timestep, *words, guidance_high=4.0, guidance_low=3.0)
    for row, (expert, guidance) in enumerate([("high", 4.0), ("high", 4.0), ("low", 3.0), ("low", 3.0)]):
        with torch.no_grad():
            wanted, unwanted = (stock[expert](noisy[row:row + 1, :, None], timestep[row:row + 1], words[row:row + 1]).sample
                                for words in (text, negative))
        expected = (unwanted + guidance * (wanted - unwanted))[0, :, 0]
        assert torch.allclose(velocity[row], expected, atol=1e-4)


def test_a_teacher_in_bfloat16_agrees_with_itself_in_float32(teacher, words, noisy):
    timestep = torch.tensor([999.0, 875.0, 874.0, 20.0])
    half = Teacher(open_teacher_files(TINY_TEACHER), dtype=torch.bfloat16)
    exact, _ = teacher.velocity(noisy, timestep, *words, 2.0, 2.0)
    found, _ = half.velocity(noisy, timestep, *words, 2.0, 2.0)
    assert found.dtype == torch.float32 and (found - exact).norm() / exact.norm() < 0.05


def test_guidance_of_one_asks_the_network_once(teacher, words, noisy):
    plain, _ = teacher.velocity(noisy, torch.full((4,), 500.0), words[0])
    guided, _ = teacher.velocity(noisy, torch.full((4,), 500.0), *words, 1.0001, 1.0001)
    assert (plain - guided).abs().max() < 1e-2


def test_features_are_those_of_the_prompts_own_pass_in_the_order_of_the_rows(teacher, words, noisy):
    timestep = torch.tensor([990.0, 20.0, 990.0, 20.0])
    _, (mixed,) = teacher.velocity(noisy, timestep, *words, 4.0, 3.0, feature_blocks=(2,))
    for row in range(4):
        _, (alone,) = teacher.velocity(noisy[row:row + 1], timestep[row:row + 1], words[0].rows(slice(row, row + 1)),
                                       feature_blocks=(2,))
        assert torch.allclose(mixed[row], alone[0], atol=1e-4)


def test_the_teacher_is_frozen_whole_and_off_meta(teacher):
    assert not any(parameter.requires_grad or parameter.is_meta for parameter in teacher.parameters())
    assert not any(buffer.is_meta for buffer in teacher.buffers()) and not teacher.experts["high"].training


def test_a_teacher_with_one_expert_answers_at_every_noise_level(tmp_path, stock, words, noisy):
    stock["low"].save_pretrained(tmp_path / "transformer")
    only = Teacher(open_teacher_files(tmp_path))
    assert only.boundary is None and list(only.files.experts) == ["only"]
    velocity, _ = only.velocity(noisy, torch.tensor([999.0, 900.0, 500.0, 1.0]), *words, 2.0)
    assert torch.isfinite(velocity).all()


@pytest.fixture
def copied(tmp_path):
    shutil.copytree(TINY_TEACHER, tmp_path / "wan")
    return tmp_path / "wan"


def weights_of(folder):
    return next(folder.glob("*.safetensors"))


@pytest.mark.parametrize("break_it, error, words", [
    (lambda wan: shutil.rmtree(wan), OSError, "no such folder"),
    (lambda wan: shutil.rmtree(wan / "transformer_2"), OSError, "transformer_2/ is missing"),
    (lambda wan: [shutil.rmtree(wan / name) for name in ("transformer", "transformer_2")], OSError, "is missing"),
    (lambda wan: (wan / "transformer/config.json").unlink(), OSError, "config.json: missing"),
    (lambda wan: (wan / "transformer/config.json").write_text("{}"), ValueError, "lacks dim"),
    (lambda wan: weights_of(wan / "transformer").unlink(), OSError, "holds no .safetensors"),
    (lambda wan: weights_of(wan / "transformer").write_bytes(weights_of(wan / "transformer").read_bytes()[:5000]),
     OSError, "not a whole safetensors"),
    (lambda wan: (wan / "transformer/diffusion_pytorch_model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"proj_out.bias": "absent.safetensors"}})), OSError, "absent.safetensors is missing"),
    (lambda wan: (wan / "transformer/diffusion_pytorch_model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"proj_out.bias": "../x.safetensors"}})), ValueError, "expected a file beside it"),
    (lambda wan: (wan / "transformer/diffusion_pytorch_model.safetensors.index.json").write_text('{"weight_map": null}'),
     ValueError, "no weight_map"),
    (lambda wan: shutil.copy(weights_of(wan / "transformer"), wan / "transformer/stale.safetensors"), ValueError,
     "stands in diffusion_pytorch_model.safetensors and in stale.safetensors"),
    (lambda wan: (wan / "model_index.json").write_text('{"boundary_ratio": 875}'), ValueError, "boundary_ratio is 875"),
])
def test_a_broken_teacher_folder_is_refused_with_its_reason(copied, break_it, error, words):
    break_it(copied)
    with pytest.raises(error, match=words):
        open_teacher_files(copied)


def test_experts_of_two_sizes_are_refused(copied):
    config = json.loads((copied / "transformer_2/config.json").read_text())
    WanTransformer3DModel(**{name: value for name, value in config.items() if not name.startswith("_")}
                          | {"num_layers": 3}).save_pretrained(copied / "transformer_2")
    with pytest.raises(ValueError, match="differ in size"):
        open_teacher_files(copied)


def test_a_shard_of_another_wan_is_refused(copied):
    config = json.loads((copied / "transformer_2/config.json").read_text())
    (copied / "transformer_2/config.json").write_text(json.dumps(config | {"ffn_dim": 64}))
    with pytest.raises(ValueError, match="of another Wan"):
        open_teacher_files(copied)


def test_the_fingerprint_tells_teachers_apart(copied):
    before = open_teacher_files(copied).fingerprint
    assert before == open_teacher_files(TINY_TEACHER).fingerprint
    high, low = copied / "transformer", copied / "transformer_2"
    high.rename(copied / "x"), low.rename(high), (copied / "x").rename(low)
    assert open_teacher_files(copied).fingerprint != before
