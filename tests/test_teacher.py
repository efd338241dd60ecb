"""The teacher, opened: both layouts, both dialects, routing at the boundary, guidance."""

import json
import shutil
import weakref

import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file, save_file

from tests.conftest import A14B, TI2V_5B, TINY_TEACHER, WAN_1_3B, official_name, write_sparse_wan
from wanlite import teacher as room
from wanlite.network import one_frame_velocity, unpack_text
from wanlite.teacher import (
    RESIDENCIES,
    ExpertFiles,
    Teacher,
    check_experts,
    choose_residency,
    diffusers_name,
    load_expert,
    open_teacher_files,
)


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


@pytest.mark.parametrize("name, other", [
    ("img_emb.proj.0.weight", "image-to-video"), ("blocks.0.cross_attn.k_img.weight", "image-to-video"),
    ("condition_embedder.image_embedder.norm1.weight", "image-to-video"), ("blocks.0.attn2.add_k_proj.bias", "image-to-video"),
    ("vace_blocks.0.before_proj.weight", "VACE"), ("audio_injector.injector.0.k.weight", "speech-to-video"),
    ("face_adapter.fuser_blocks.0.k_norm.weight", "Animate"), ("control_adapter.conv.weight", "Fun Control"),
    ("blocks.0.self_attn.q.lora_A.weight", "LoRA")])
def test_a_tensor_of_another_kind_of_wan_is_refused_with_its_kind(name, other):
    with pytest.raises(ValueError, match=f"{name}.*belongs to .*{other}"):
        diffusers_name(name)


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
    parameters = [*teacher.expert("high").parameters(), *teacher.expert("low").parameters()]
    assert not any(parameter.requires_grad or parameter.is_meta for parameter in parameters)
    assert not any(buffer.is_meta for buffer in teacher.expert("high").buffers()) and not teacher.expert("high").training


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


def change(folder, how):
    """Rewrite the only file of an expert after `how` has changed its dict of tensors; returns the dict."""
    tensors = load_file(weights_of(folder))
    how(tensors)
    save_file(tensors, weights_of(folder))
    return tensors


def edit_config(folder, **settings):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


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
    (lambda wan: weights_of(wan / "transformer").write_bytes(weights_of(wan / "transformer").read_bytes()[:-1]),
     OSError, "not a whole safetensors"),
    (lambda wan: (wan / "transformer_2/xyz.safetensors.incomplete").touch(), OSError, "xyz.safetensors.incomplete is a download"),
    (lambda wan: (wan / "transformer_2/xyz.safetensors.aria2").touch(), OSError, "xyz.safetensors.aria2 is a download"),
    (lambda wan: weights_of(wan / "transformer").rename(wan / "transformer/x-00002-of-00003.safetensors"),
     OSError, "shard x-00001-of-00003.safetensors is missing.*2 of 3"),
    (lambda wan: edit_config(wan / "transformer", in_channels=36), ValueError, "takes 36 channels and gives 16: an image-to-video"),
    (lambda wan: change(wan / "transformer", lambda tensors: tensors.update({"img_emb.proj.0.bias": torch.zeros(8)})),
     ValueError, "model.safetensors.*img_emb.proj.0.bias.*image-to-video"),
    *((lambda wan, dtype=dtype: change(wan / "transformer", lambda tensors: tensors.update(
        {"proj_out.bias": tensors["proj_out.bias"].to(dtype)})), ValueError, f"proj_out.bias is stored as {found}, expected one of")
      for dtype, found in ((torch.float64, "F64"), (torch.int8, "I8"), (torch.uint8, "U8"), (torch.bool, "BOOL"))),
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


@pytest.fixture
def official_copy(official_teacher, tmp_path):
    shutil.copytree(official_teacher, tmp_path / "official")
    return tmp_path / "official"


def test_an_index_that_promises_what_no_shard_holds_is_refused_with_shard_and_tensor(official_copy):
    path = official_copy / "low_noise_model/diffusion_pytorch_model.safetensors.index.json"
    weight_map = json.loads(path.read_text())["weight_map"]
    shard = official_copy / "low_noise_model" / weight_map["blocks.2.ffn.0.weight"]
    tensors = load_file(shard)
    del tensors["blocks.2.ffn.0.weight"]
    save_file(tensors, shard)
    with pytest.raises(ValueError, match=f"index promises blocks.2.ffn.0.weight in {shard.name}, no shard holds it"):
        open_teacher_files(official_copy)


def test_a_tensor_in_another_shard_than_the_index_says_is_found(official_copy):
    path = official_copy / "low_noise_model/diffusion_pytorch_model.safetensors.index.json"
    index = json.loads(path.read_text())
    before = open_teacher_files(official_copy).experts["low"]
    first, second = sorted(set(index["weight_map"].values()))[:2]
    moved = next(name for name, shard in index["weight_map"].items() if shard == first)
    index["weight_map"][moved] = second
    path.write_text(json.dumps(index))
    after = open_teacher_files(official_copy).experts["low"]
    assert after.places == before.places and after.places[diffusers_name(moved)][0].name == first


def test_a_wider_shard_among_the_shards_is_refused_by_name(official_copy):
    shard = sorted((official_copy / "high_noise_model").glob("*.safetensors"))[1]
    save_file({name: torch.cat([tensor, tensor]) for name, tensor in load_file(shard).items()}, shard)
    with pytest.raises(ValueError, match=f"{shard.name}: .*The shard is of another Wan"):
        open_teacher_files(official_copy)


def test_the_fingerprint_tells_teachers_apart(copied):
    before = open_teacher_files(copied).fingerprint
    assert before == open_teacher_files(TINY_TEACHER).fingerprint
    high, low = copied / "transformer", copied / "transformer_2"
    high.rename(copied / "x"), low.rename(high), (copied / "x").rename(low)
    assert open_teacher_files(copied).fingerprint != before


# ---- rows and fp8 --------------------------------------------------------------------------------------------------------

FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
LAYER = "blocks.1.ffn.net.0.proj"


@pytest.mark.parametrize("rows", [slice(3, 7), slice(0, 1), slice(500, 512), slice(None)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_of_a_tensor_are_the_rows_of_the_whole(rows, dtype):
    expert = open_teacher_files(TINY_TEACHER).experts["low"]
    for name in (f"{LAYER}.weight", f"{LAYER}.bias"):
        found = expert.read(name, dtype, rows)
        assert found.dtype == dtype and torch.equal(found, expert.read(name, dtype)[rows])


def test_rows_are_read_without_the_rest_of_the_tensor(monkeypatch):
    expert, opened = open_teacher_files(TINY_TEACHER).experts["low"], room.safe_open

    class OnlySlices:
        def __init__(self, *arguments):
            self.file = opened(*arguments)

        def __enter__(self):
            self.get_slice = self.file.__enter__().get_slice
            return self

        def __exit__(self, *arguments):
            return self.file.__exit__(*arguments)

    monkeypatch.setattr(room, "safe_open", OnlySlices)
    assert expert.read(f"{LAYER}.weight", rows=slice(3, 5)).shape == (2, 128)


def quantize(tensors, layer, dtype, scale, kind, marks=()):
    """Store a layer's weight in fp8 beside its scale and what else ComfyUI writes; the exact value is weight.float() * scale."""
    weight = tensors[f"{layer}.weight"] / (1 if scale is None else scale.reshape(-1, 1))
    tensors[f"{layer}.weight"] = weight.to(dtype)
    if scale is not None:
        tensors[f"{layer}.{kind}"] = scale
    tensors |= {f"{layer}.{mark}": torch.ones(()) for mark in marks if mark != "comfy_quant"}
    if "comfy_quant" in marks:
        tensors[f"{layer}.comfy_quant"] = torch.tensor(list(b'{"format": "float8_e4m3fn"}'), dtype=torch.uint8)


@pytest.mark.parametrize("dtype", FP8)
@pytest.mark.parametrize("prefix, dialect", [("", "diffusers"), ("", "official"), ("model.diffusion_model.", "official")])
@pytest.mark.parametrize("kind, marks, scale", [
    (None, (), None), ("scale_weight", (), torch.tensor(0.0625)), ("scale_weight", ("scale_input",), torch.tensor([0.03])),
    ("scale_weight", (), torch.linspace(0.1, 1, 512)), ("scale_weight", (), torch.linspace(0.1, 1, 512)[:, None]),
    ("weight_scale", ("input_scale", "comfy_quant"), torch.tensor(0.03)),
    ("weight_scale", ("comfy_quant",), torch.linspace(0.1, 1, 512))])
def test_a_weight_in_fp8_is_its_stored_value_times_its_scale(copied, dtype, prefix, dialect, kind, marks, scale):
    def store(tensors):
        quantize(tensors, LAYER, dtype, scale, kind, marks)
        if kind == "scale_weight":
            tensors["scaled_fp8"] = torch.zeros(2, dtype=dtype)
        renamed = {prefix + (official_name(name) if dialect == "official" else name): tensor for name, tensor in tensors.items()}
        wanted.append(tensors[f"{LAYER}.weight"].float() * (1 if scale is None else scale.reshape(-1, 1)))
        tensors.clear(), tensors.update(renamed)

    wanted = []
    change(copied / "transformer_2", store)
    expert = open_teacher_files(copied).experts["low"]
    assert expert.places.keys() == open_teacher_files(TINY_TEACHER).experts["low"].places.keys()
    assert torch.equal(expert.read(f"{LAYER}.weight"), wanted[0])
    assert torch.equal(expert.read(f"{LAYER}.weight", torch.bfloat16, slice(5, 9)), wanted[0][5:9].bfloat16())


def test_shards_may_differ_in_precision_and_a_scale_may_lie_in_another_shard_than_its_weight(official_copy):
    folder = official_copy / "low_noise_model"
    (folder / "diffusion_pytorch_model.safetensors.index.json").unlink()
    first, second, third = sorted(folder.glob("*.safetensors"))
    save_file({name: tensor.half() for name, tensor in load_file(first).items()}, first)
    weights = load_file(second)
    name = next(name for name in sorted(weights) if "_attn" in name and weights[name].ndim == 2)
    weights[name] = (weights[name] / 0.01).to(torch.float8_e4m3fn)
    save_file(weights, second)
    save_file({key: tensor.bfloat16() for key, tensor in load_file(third).items()}
              | {name.replace(".weight", ".scale_weight"): torch.tensor(0.01)}, third)
    found, exact = open_teacher_files(official_copy).experts["low"], open_teacher_files(TINY_TEACHER).experts["low"]
    for name in exact.places:
        assert (found.read(name) - exact.read(name)).norm() <= 0.05 * exact.read(name).norm()


@pytest.mark.parametrize("extra, words", [
    ({f"{LAYER}.scale_weight": torch.tensor(float("nan"))}, f"scale of {LAYER}.weight holds nan"),
    ({f"{LAYER}.weight_scale": torch.tensor(float("inf"))}, f"scale of {LAYER}.weight holds inf"),
    ({f"{LAYER}.weight_scale": torch.tensor(0.0)}, f"scale of {LAYER}.weight holds 0.0"),
    ({f"{LAYER}.weight_scale": torch.ones(512, 4)}, f"scale of {LAYER}.weight is torch.float32 .512, 4.*one a row .512"),
    ({f"{LAYER}.weight_scale": torch.ones(512, dtype=torch.uint8)}, f"scale of {LAYER}.weight is torch.uint8"),
    ({"blocks.9.ffn.2.scale_weight": torch.tensor(1.0)}, "scale of blocks.9.ffn.net.2.weight but no such weight"),
    ({"blocks.0.ffn.9.scale_weight": torch.tensor(1.0)}, "blocks.0.ffn.9.weight' is no tensor")])
def test_a_scale_that_cannot_be_right_is_refused_by_name(copied, extra, words):
    change(copied / "transformer_2", lambda tensors: tensors.update(extra))
    with pytest.raises(ValueError, match=words):
        open_teacher_files(copied)


# ---- two experts ---------------------------------------------------------------------------------------------------------

def exchange(folder, first, second):
    (folder / first).rename(folder / "x"), (folder / second).rename(folder / first), (folder / "x").rename(folder / second)


def test_the_cosines_of_two_experts_are_those_of_their_weights():
    files = open_teacher_files(TINY_TEACHER)
    high, low = ({name: expert.read(name) for name in expert.places} for expert in files.experts.values())
    names = {group: [name for name in high if f".{group}." in name] for group in ("attn1", "attn2", "ffn")}
    names["rest"] = list(high.keys() - {name for group in names.values() for name in group})
    expected = {group: torch.cosine_similarity(*(torch.cat([expert[name].flatten() for name in part]).double()
                                                 for expert in (high, low)), dim=0).item() for group, part in names.items()}
    assert check_experts(files) == pytest.approx(expected, abs=1e-6) and min(expected.values()) < 0.99


def test_a_teacher_with_one_expert_has_nothing_to_compare_and_is_not_read(tmp_path, monkeypatch):
    shutil.copytree(TINY_TEACHER / "transformer", tmp_path / "transformer")
    monkeypatch.setattr(ExpertFiles, "read", None)
    assert check_experts(open_teacher_files(tmp_path)) == {}


def test_the_same_expert_twice_is_refused(copied):
    shutil.rmtree(copied / "transformer_2")
    shutil.copytree(copied / "transformer", copied / "transformer_2")
    with pytest.raises(ValueError, match="transformer and transformer_2 hold the same weights"):
        check_experts(open_teacher_files(copied))


@pytest.mark.parametrize("row", [0, -1])
def test_experts_that_differ_in_one_number_are_not_taken_for_the_same(copied, row):
    def change_one_number(tensors):
        tensors["blocks.3.ffn.net.2.weight"][row, -1] += 1e-3

    shutil.rmtree(copied / "transformer_2")
    shutil.copytree(copied / "transformer", copied / "transformer_2")
    change(copied / "transformer_2", change_one_number)
    cosines = check_experts(open_teacher_files(copied))
    assert cosines == pytest.approx(dict.fromkeys(("attn1", "attn2", "ffn", "rest"), 1.0), abs=1e-5)


def test_exchanged_experts_are_refused_in_either_layout(copied, official_copy):
    exchange(copied, "transformer", "transformer_2"), exchange(official_copy, "high_noise_model", "low_noise_model")
    for folder in (copied, official_copy):
        with pytest.raises(ValueError, match="hold each other's weights: at noise level 0.3 .* at noise level 0.99"):
            check_experts(open_teacher_files(folder))


@pytest.mark.parametrize("seed", range(3))
def test_the_evidence_is_clear_of_its_margins_for_every_noise(seed):
    experts = open_teacher_files(TINY_TEACHER).experts
    (high_at_low, high_at_high), (low_at_low, low_at_high) = room.noise_left(room._PairedExperts(*experts.values(), "cpu"), seed)
    assert high_at_low > 2 * room.PROBE_MARGINS[0] * low_at_low and low_at_high > 1.1 * room.PROBE_MARGINS[1] * high_at_high
    assert max(low_at_low, high_at_high) < room.PROBE_LIMIT / 5


@pytest.mark.parametrize("folder", ["transformer", "transformer_2"])
def test_an_expert_that_is_merely_worse_at_every_level_is_let_through(copied, folder):
    def blur(tensors):
        for name in tensors:
            tensors[name] += 0.2 * tensors[name].std() * torch.randn(tensors[name].shape, generator=generator)

    generator = torch.Generator().manual_seed(0)
    shutil.rmtree(copied / "transformer_2")
    shutil.copytree(copied / "transformer", copied / "transformer_2")
    change(copied / folder, blur)
    check_experts(open_teacher_files(copied))


def test_untrained_experts_are_let_through_in_either_order(copied):
    def scramble(tensors):
        for name in tensors:
            tensors[name] = 0.05 * torch.randn(tensors[name].shape, generator=generator)

    generator = torch.Generator().manual_seed(0)
    change(copied / "transformer", scramble), change(copied / "transformer_2", scramble)
    check_experts(open_teacher_files(copied))
    exchange(copied, "transformer", "transformer_2")
    check_experts(open_teacher_files(copied))


@pytest.mark.parametrize("left, changed", [
    (((0.01, 0.05), (0.05, 0.01)), True), (((0.05, 0.01), (0.01, 0.05)), False),      # exchanged, in order
    (((0.01, 0.01), (0.05, 0.05)), False), (((0.05, 0.05), (0.01, 0.01)), False),     # one is the worse everywhere
    (((0.01, 0.011), (0.05, 0.01)), False), (((0.03, 0.05), (0.05, 0.01)), False),    # clear at one level only
    (((0.2, 0.05), (0.9, 0.01)), False), (((0.01, 0.9), (0.05, 0.2)), False),         # neither knows the noise at a level
    (((float("nan"), 0.05), (0.05, 0.01)), False), (((0.01, 0.05), (0.05, float("nan"))), False)])
def test_experts_have_changed_places_only_if_both_levels_say_so(left, changed):
    assert room.have_changed_places(left) is changed


def test_two_experts_in_step_are_the_two_experts(teacher, noisy):
    experts = teacher.files.experts
    pair = room._PairedExperts(*experts.values(), "cpu")
    latents, timestep = noisy.repeat(4, 1, 1, 1), torch.linspace(10, 990, 16)
    text = torch.randn(16, 3, 64, generator=torch.Generator().manual_seed(0))
    bias = torch.zeros(16, 3)
    with torch.no_grad():
        found, _ = one_frame_velocity(pair, latents, timestep, text, bias)
    for name, half in (("high", slice(0, 8)), ("low", slice(8, 16))):
        expected, _ = one_frame_velocity(load_expert(experts[name]), latents[half], timestep[half], text[half], bias[half])
        assert torch.allclose(found[half], expected, atol=1e-5)


def test_comparing_reads_each_tensor_whole_once_and_one_block_of_each_expert_at_a_time(monkeypatch):
    files, whole, blocks, loaded = open_teacher_files(TINY_TEACHER), [], [], []
    read, empty_block = ExpertFiles.read, room._empty_block

    def watched_read(expert, name, dtype=torch.float32, rows=None):
        whole.extend([(expert.name, name)] if rows is None else [])
        alive = [reference() for reference in blocks if reference() is not None]
        loaded.append(sum(not next(block.parameters()).is_meta for block in alive))
        return read(expert, name, dtype, rows)

    def watched_block(expert):
        block = empty_block(expert)
        blocks.append(weakref.ref(block))
        return block

    monkeypatch.setattr(ExpertFiles, "read", watched_read)
    monkeypatch.setattr(room, "_empty_block", watched_block)
    check_experts(files)
    assert sorted(whole) == sorted((expert.name, name) for expert in files.experts.values() for name in expert.places)
    assert len(blocks) == 8 and max(loaded) == 1           # the other expert's, while one is read


# ---- real shapes ---------------------------------------------------------------------------------------------------------

NONE = [None, None]
MODULE = ["diffusers", "WanTransformer3DModel"]


@pytest.mark.parametrize("layout", ["official", "diffusers"])
@pytest.mark.parametrize("model, num_experts, num_shards, num_parameters, num_tensors", [
    (A14B, 2, {"official": 6, "diffusers": 12}, 14_288_491_584, 1095),
    (A14B, 1, {"official": 6, "diffusers": 12}, 14_288_491_584, 1095),
    (WAN_1_3B, 1, {"official": 1, "diffusers": 2}, 1_418_996_800, 825),
    (TI2V_5B, 1, {"official": 3, "diffusers": 3}, 4_999_787_712, 825)], ids=["2.2-A14B", "2.1-14B", "2.1-1.3B", "2.2-5B"])
def test_every_wan_opens_at_its_real_shape(model, num_experts, num_shards, num_parameters, num_tensors, layout, tmp_path):
    folders = {("official", 2): ["high_noise_model", "low_noise_model"], ("official", 1): ["."],
               ("diffusers", 2): ["transformer", "transformer_2"], ("diffusers", 1): ["transformer"]}[layout, num_experts]
    for name in folders:
        write_sparse_wan(tmp_path / "wan" / name, model, layout, num_shards[layout])
    if layout == "diffusers":
        (tmp_path / "wan/model_index.json").write_text(json.dumps(
            {"_class_name": "WanPipeline", "transformer": MODULE, "transformer_2": MODULE if num_experts == 2 else NONE,
             "boundary_ratio": 0.875 if num_experts == 2 else None, "expand_timesteps": model is TI2V_5B}))
    files = open_teacher_files(tmp_path / "wan")
    assert (files.layout, files.boundary) == (layout, 0.875 if num_experts == 2 else None)
    assert list(files.experts) == (["high", "low"] if num_experts == 2 else ["only"])
    for expert in files.experts.values():
        assert (expert.num_parameters, len(expert.places), expert.width) == (num_parameters, num_tensors, model["width"])
    assert files.config["in_channels"] == model["channels"] and files.config["patch_size"] == (1, 2, 2)


# ---- where experts are ---------------------------------------------------------------------------------------------------------

GIB = 2**30


@pytest.fixture
def asked(words, noisy):
    """What a teacher is asked: rows of both experts, prompts and negative prompts, token states of a block."""
    text, negative = words
    return {"latents": noisy, "timestep": torch.tensor([990.0, 100.0, 900.0, 500.0]), "text": text, "negative": negative,
            "guidance_high": 4.0, "guidance_low": 3.0, "feature_blocks": (2,)}


@pytest.mark.parametrize("residency", RESIDENCIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_velocity_does_not_depend_on_where_experts_are(residency, dtype, asked):
    files = open_teacher_files(TINY_TEACHER)
    (expected, (states,)), (found, (own,)) = (Teacher(files, dtype=dtype, residency=where).velocity(**asked)
                                              for where in ("both", residency))
    assert torch.equal(found, expected) and torch.equal(own, states)


def test_float8_storage_takes_a_quarter_of_float32_and_stays_near(asked, teacher):
    small = Teacher(open_teacher_files(TINY_TEACHER), dtype=torch.bfloat16, is_fp8=True)
    (found, _), (expected, _) = small.velocity(**asked), teacher.velocity(**asked)
    assert 1e-4 < (found - expected).square().mean() / expected.square().mean() < 0.02
    kept = {tensor.dtype for name, tensor in small.expert("low").named_parameters() if ".to_q.weight" in name}
    assert kept == {torch.float8_e4m3fn}
    assert small.expert("low").scale_shift_table.dtype == torch.float32


def test_one_expert_at_a_time_holds_one_and_at_rest_none(asked):
    found = Teacher(open_teacher_files(TINY_TEACHER), residency="one")
    held = weakref.ref(found.expert("high").blocks[0].ffn.net[0].proj)
    found.expert("low")
    assert held() is None
    held = weakref.ref(found.expert("low").blocks[0].ffn.net[0].proj)
    found.rest()
    assert held() is None
    found.velocity(**asked)                                  # and reads it again where it is asked


def test_few_rows_at_once_give_what_all_give(asked, teacher):
    few = Teacher(open_teacher_files(TINY_TEACHER), tokens_at_once=1)
    (found, (own,)), (expected, (states,)) = few.velocity(**asked), teacher.velocity(**asked)
    assert torch.allclose(found, expected, atol=1e-4) and torch.allclose(own, states, atol=1e-4)     # of values up to 22 and 60
    seen = []
    few.expert("low").register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    few.velocity(**asked)
    assert seen == [2, 2]                                    # one picture, wanted and unwanted


@pytest.mark.parametrize("is_fp8, free_device, free_host, is_cpu, expected", [
    (False, 78, 200, False, "both"), (False, 47, 200, False, "one"), (False, 23, 200, False, "streamed"),
    (False, 23, 70, False, "disk"), (True, 47, 200, False, "both"), (True, 31, 200, False, "one"), (False, 47, 40, False, "disk"),
    (False, 78, 78, True, "both"),
    (False, 47, 47, True, "one"), (False, 23, 23, True, "disk")])
def test_the_residency_of_a14b_follows_free_memory(is_fp8, free_device, free_host, is_cpu, expected, tmp_path):
    for name in ("high_noise_model", "low_noise_model"):
        write_sparse_wan(tmp_path / name, A14B, "official", 6)
    files = open_teacher_files(tmp_path)
    assert choose_residency(files, torch.bfloat16, is_fp8, free_device * GIB, free_host * GIB, is_cpu) == expected


def test_gpus_of_one_machine_share_the_experts_of_a14b_out_where_neither_they_nor_the_cpu_hold_one(tmp_path):
    for name in ("high_noise_model", "low_noise_model"):
        write_sparse_wan(tmp_path / name, A14B, "official", 6)
    files = open_teacher_files(tmp_path)
    chosen = [choose_residency(files, torch.bfloat16, is_fp8, free * GIB, 41 * GIB, shares=shares)
              for is_fp8, free, shares in ((False, 23, 1), (False, 23, 2), (False, 23, 8), (True, 18, 8))]
    assert chosen == ["disk", "disk", "sharded", "streamed"]
