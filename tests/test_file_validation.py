"""A file is either read exactly, or refused with an OSError or ValueError that names it."""

import json
import math
import shutil
import warnings

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from train_distillation import WanLiteStudent
from wanlite.files.dtypes import BYTES_PER_VALUE, STUDENT_DTYPES
from wanlite.files.json_files import parse_json
from wanlite.files.weights import WeightsFile
from wanlite.student.building import config_defaults
from wanlite.student.config import STOCK_SETTINGS, read_config, student_arguments
from wanlite.student.weights import all_tensor_shapes, find_weights

BYTES = {name: BYTES_PER_VALUE[name] for name in STUDENT_DTYPES}
SMALL = dict(
    hidden_size=16,
    depth=1,
    num_heads=2,
    ffn_dim=32,
    num_channels=4,
    text_dim=8,
    freq_dim=32,
    rope_max_seq_len=32,
)
WEIGHTS, INDEX = "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.safetensors.index.json"
settings.register_profile("same_every_time", derandomize=True, deadline=None, database=None, max_examples=150)
settings.load_profile("same_every_time")

any_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
tensors = st.lists(
    st.tuples(st.sampled_from(sorted(BYTES)), st.lists(st.integers(0, 4), max_size=4)), max_size=5
)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tmp_path_factory.mktemp("any") / "any.safetensors"


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "student"
    WanLiteStudent(**SMALL).save_pretrained(folder)
    return folder


def laid_out(described):
    """Return the header and the number of bytes of contiguous tensors."""
    header, end = {}, 0
    for number, (dtype, shape) in enumerate(described):
        start, end = end, end + BYTES[dtype] * math.prod(shape)
        header[f"t{number}"] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    return header, end


def write(path, header, num_bytes, length=None):
    text = json.dumps(header).encode()
    path.write_bytes(
        (len(text) if length is None else length).to_bytes(8, "little") + text + bytes(num_bytes)
    )


def shapes_or_refusal(path):
    """Return {name: shape} of a valid file, whose tensors tile it and can be read; None if it is refused."""
    try:
        weights = WeightsFile(path)
    except (OSError, ValueError) as refused:
        assert str(path) in str(refused) and len(str(refused)) < 3000
        return None
    with weights:
        end = 8 + int.from_bytes(path.read_bytes()[:8], "little")
        for entry in sorted(weights.entries.values(), key=lambda entry: (entry.start, entry.stop)):
            assert entry.start == end and entry.stop - end == BYTES[entry.dtype] * math.prod(entry.shape)
            end = entry.stop
        assert end == path.stat().st_size and weights.num_bytes <= end
        for is_hashed in (True, False):
            try:
                read = {name: tuple(tensor.shape) for name, tensor in weights.tensors(is_hashed)}
            except ValueError as refused:
                assert str(path) in str(refused) and "NaN or infinity" in str(refused)
            else:
                assert read == {name: entry.shape for name, entry in weights.entries.items()}
        return {name: entry.shape for name, entry in weights.entries.items()}


# ---- weights -----------------------------------------------------------------------------------------------


@given(content=st.binary(max_size=200))
@example(content=(2).to_bytes(8, "little") + b"{}")
def test_any_bytes_are_refused_or_tile_the_file(content, path):
    path.write_bytes(content)
    shapes_or_refusal(path)


@given(content=st.binary(max_size=200) | any_json.map(lambda found: json.dumps(found).encode()))
def test_any_bytes_are_refused_or_parsed_like_json(content):
    try:
        found = parse_json(content, "some file")
    except OSError as refused:
        assert str(refused).startswith("some file: ")
    else:
        assert isinstance(found, dict) and found == json.loads(content)


@given(
    header=st.dictionaries(
        st.text(max_size=8),
        any_json
        | st.fixed_dictionaries(
            {
                "dtype": st.sampled_from([*BYTES, "F64", "I8"]) | any_json,
                "shape": st.lists(st.integers(-1, 3), max_size=3) | any_json,
                "data_offsets": st.lists(st.integers(-1, 30), min_size=2, max_size=2) | any_json,
            }
        ),
        max_size=4,
    )
    | any_json,
    num_bytes=st.integers(0, 40),
)
def test_any_header_is_refused_or_tiles_the_file(header, num_bytes, path):
    write(path, header, num_bytes)
    shapes_or_refusal(path)


@given(described=tensors, order=st.randoms(use_true_random=False))
def test_contiguous_tensors_are_accepted_in_any_order_of_their_names(described, order, path):
    header, num_bytes = laid_out(described)
    names = sorted(header)
    order.shuffle(names)
    write(path, {name: header[name] for name in names} | {"__metadata__": {"format": "pt"}}, num_bytes)
    assert shapes_or_refusal(path) == {
        f"t{number}": tuple(shape) for number, (_, shape) in enumerate(described)
    }


@given(described=tensors.filter(len), data=st.data())
def test_a_changed_header_is_refused_or_tiles_the_file(described, data, path):
    header, num_bytes = laid_out(described)
    entry = header[data.draw(st.sampled_from(sorted(header)), "tensor")]
    what = data.draw(st.sampled_from([*entry, "size", "offset", "word", "tensor", "length", "body"]), "what")
    by, length = (
        data.draw(st.sampled_from([-8, -4, -2, -1, 1, 2, 4, 8, 2**31, 2**62, 2**63, 2**64, 10**30]), "by"),
        None,
    )
    if what in entry:
        entry[what] = data.draw(
            {
                "dtype": st.sampled_from([*BYTES, "F64"]),
                "shape": st.lists(st.integers(0, 2**64), max_size=9),
                "data_offsets": st.lists(st.integers(-8, 64), max_size=3),
            }[what]
            | any_json
        )
    elif what == "size" and entry["shape"]:
        entry["shape"][-1] += by
    elif what == "offset":
        entry["data_offsets"][data.draw(st.integers(0, 1))] += by
    elif what == "word":
        entry[data.draw(st.text(max_size=3))] = data.draw(any_json)
    elif what == "tensor":
        header[data.draw(st.text(max_size=3))] = (
            dict(entry) if data.draw(st.booleans()) else data.draw(any_json)
        )
    elif what == "length":
        length = max(0, min(2**64 - 1, len(json.dumps(header)) + by))
    else:
        num_bytes = max(0, num_bytes + max(-8, min(8, by)))
    write(path, header, num_bytes, length)
    shapes_or_refusal(path)


@given(data=st.data())
def test_a_file_with_flipped_bits_or_truncated_is_refused_or_keeps_its_shapes(
    data, student, tmp_path_factory
):
    content = bytearray((student / WEIGHTS).read_bytes())
    header_end = 8 + int.from_bytes(content[:8], "little")
    places = st.integers(0, 7) | st.integers(8, header_end - 1) | st.integers(header_end, len(content) - 1)
    for place, bit in data.draw(st.lists(st.tuples(places, st.integers(0, 7)), max_size=3), "turned"):
        content[place] ^= 1 << bit
    if data.draw(st.integers(0, 3), "is truncated") == 3:
        del content[data.draw(st.integers(0, len(content)), "size") :]
    folder = tmp_path_factory.getbasetemp() / "damaged"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(student, folder)
    (folder / WEIGHTS).write_bytes(content)
    shapes_or_refusal(folder / WEIGHTS)
    try:
        loaded = WanLiteStudent.from_pretrained(folder)
    except (OSError, ValueError) as refused:
        assert str(folder) in str(refused)
    else:
        assert {
            name: tuple(tensor.shape) for name, tensor in loaded.state_dict().items()
        } == all_tensor_shapes(SMALL | {"patch_size": (1, 2, 2), "cross_attn_norm": True})
        assert all(tensor.isfinite().all() for tensor in loaded.state_dict().values())


# ---- index -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder_among_others(tmp_path_factory):
    """A folder of shards, beside, above and below other shards, with links to inside and outside."""
    place = tmp_path_factory.mktemp("others")
    folder = place / "student"
    for name in (
        "a.safetensors",
        "student/a.safetensors",
        "student/b.safetensors",
        "student/sub/a.safetensors",
        "student/a.bin",
    ):
        (place / name).parent.mkdir(exist_ok=True)
        (place / name).write_bytes(b"")
    (folder / "in.safetensors").symlink_to("a.safetensors")
    (folder / "out.safetensors").symlink_to("../a.safetensors")
    (folder / "up").symlink_to("..")
    return folder


file_names = st.lists(
    st.sampled_from(
        [
            "a",
            "b",
            "in",
            "out",
            "up",
            "sub",
            ".",
            "..",
            "/",
            "\\",
            ".safetensors",
            ".bin",
            "~",
            "\0",
            "\n",
            "C:",
            "%2e",
            " ",
            "-",
            "",
        ]
    ),
    max_size=5,
).map("".join)


@given(
    weight_map=st.dictionaries(
        st.text(max_size=3), file_names.map(lambda name: f"{name}.safetensors") | file_names, max_size=3
    )
    | st.dictionaries(
        st.text(max_size=3), st.sampled_from(["a.safetensors", "b.safetensors", "in.safetensors"]), max_size=3
    )
    | st.dictionaries(st.text(max_size=3), any_json, max_size=3)
    | any_json
)
@example(weight_map={"a": "a.safetensors", "b": "b.safetensors", "in": "in.safetensors"})
def test_an_index_never_reaches_outside_of_its_folder(weight_map, folder_among_others):
    (folder_among_others / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    try:
        found = find_weights(folder_among_others)
    except OSError as refused:
        assert str(folder_among_others) in str(refused)
    else:
        assert found and {path.name for path in found} == set(weight_map.values())
        assert all(path.resolve().parent == folder_among_others and path.is_file() for path in found)
        assert {name: path.name for path, names in found.items() for name in names} == weight_map


# ---- config ------------------------------------------------------------------------------------------------


def built_shapes(arguments):
    with torch.device("meta"):
        return {
            name: tuple(tensor.shape) for name, tensor in WanLiteStudent(**arguments).state_dict().items()
        }


sizes = st.sampled_from([1, 2, 4, 6, 8, 12, 16, 32, 64])
plausible = dict.fromkeys(
    [
        "hidden_size",
        "num_heads",
        "num_channels",
        "text_dim",
        "freq_dim",
        "rope_max_seq_len",
        "in_channels",
        "num_attention_heads",
        "attention_head_dim",
        "out_channels",
    ],
    sizes,
)
plausible |= {
    "ffn_dim": sizes | st.none(),
    "depth": st.integers(1, 3),
    "num_layers": st.integers(1, 3),
    "patch_size": st.tuples(st.just(1), sizes, sizes).map(list),
    "eps": st.sampled_from([1e-6, 1e-5]),
    "cross_attn_norm": st.booleans(),
    "qk_norm": st.just("rms_norm_across_heads"),
    "image_dim": st.none(),
    "_class_name": st.sampled_from(["WanLiteStudent", "WanTransformer3DModel"]),
}
odd = (
    st.sampled_from(
        [0, -1, 65536, 65537, 10**7, 10**40, True, 1.0, 4.5, math.nan, math.inf, "4", None, [], {}]
    )
    | any_json
)


@given(
    chosen=st.fixed_dictionaries({}, optional=plausible),
    changes=st.dictionaries(
        st.sampled_from(sorted({*plausible, "quantization_config", "auto_map", "teacher_checkpoint_path"}))
        | st.text(max_size=4),
        odd,
        max_size=2,
    ),
    is_changed=st.booleans(),
)
@settings(max_examples=300)
def test_any_config_is_refused_or_builds_the_implied_shapes(chosen, changes, is_changed):
    defaults = config_defaults(WanLiteStudent) | SMALL
    config = chosen | (changes if is_changed else {})
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            arguments = student_arguments(config, defaults)
    except ValueError as refused:
        assert len(str(refused)) < 3000
        return
    assert arguments.keys() == defaults.keys()
    assert all(
        arguments[name] == value for name, value in config.items() if name in defaults and value is not None
    )
    if arguments["hidden_size"] <= 64 and arguments["depth"] <= 3 and arguments["rope_max_seq_len"] <= 1024:
        assert built_shapes(arguments) == all_tensor_shapes(arguments)


@given(
    config=st.dictionaries(st.sampled_from(sorted(plausible)) | st.text(max_size=4), odd, max_size=4)
    | any_json
)
def test_any_config_file_is_refused_or_read_unchanged(config, tmp_path_factory):
    folder = tmp_path_factory.getbasetemp() / "config"
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    try:
        found = read_config(folder)
    except (OSError, ValueError) as refused:
        assert str(folder) in str(refused)
    else:
        assert found == config


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"cross_attn_norm": False},
        {"ffn_dim": None},
        {"ffn_dim": 50},
        {"depth": 3, "num_heads": 4},
        {"num_channels": 48},
        {"num_channels": 48, "text_dim": 4096, "hidden_size": 48, "num_heads": 3},
        {"patch_size": (1, 1, 1)},
        {"patch_size": (1, 4, 2)},
        {"freq_dim": 256, "hidden_size": 64, "num_heads": 1},
        {"num_heads": 8},
    ],
)
def test_the_implied_shapes_are_those_of_the_student(changes):
    real = {
        name: tuple(tensor.shape) for name, tensor in WanLiteStudent(**SMALL | changes).state_dict().items()
    }
    arguments = student_arguments(SMALL | changes, config_defaults(WanLiteStudent))
    assert all_tensor_shapes(arguments) == real == built_shapes(arguments)


def test_every_setting_of_a_saved_student_is_known(student):
    config = {name for name in json.loads((student / "config.json").read_text()) if name[0] != "_"}
    assert config <= config_defaults(WanLiteStudent).keys() | STOCK_SETTINGS
