"""Saved students with broken headers or tensors: each is rejected at once, cheaply and by name."""

import json
import math
from functools import partial

import pytest
import torch

from tests.broken_students import (
    CONFIG,
    DEEP,
    HUGE,
    LONG,
    MILLION_LETTERS,
    WEIGHTS,
    both,
    called_with,
    changed,
    cut,
    described,
    each,
    entry,
    header,
    more,
    raw,
    renamed,
    saved_with,
    settings,
    sparse,
    tensors,
    weights,
    whole,
    with_common_words,
    zeros_of,
)
from tests.refusals import check_broken, rows

BAD_HEADERS = [
    *with_common_words(
        OSError,
        [WEIGHTS, "not a complete safetensors file"],
        {
            "no bytes": (weights(b""), "0 bytes hold no header"),
            "7 bytes": (weights(b"1234567"), "7 bytes hold no header"),
            "8 bytes": (weights(raw(b"", length=2)), "8 bytes hold no header"),
            "header of length 0": (weights(bytes(100)), "header has 0 bytes"),
            "header of length 1": (weights(raw(b"{", bytes(90))), "header has 1 bytes"),
            "header of length 2^63": (
                weights(raw({}, bytes(90), 2**63)),
                "header has 9,223,372,036,854,775,808 bytes",
            ),
            "header of length 2^64 - 1": (
                weights(raw({}, bytes(90), 2**64 - 1)),
                "header has 18,446,744,073,709,551,615 bytes",
            ),
            "header past the end": (
                weights(raw({"a": entry()}, length=1000)),
                "header has 1,000 bytes, expected 2 to 61",
            ),
            "header one byte past the end": (
                weights(raw({}, length=3)),
                "header has 3 bytes, expected 2 to 2",
            ),
            "header of 128 MB": (sparse(raw(b"{}", length=2**27), 2**28), "header has 134,217,728 bytes"),
            "header of 4 MB and a byte": (
                sparse(raw(b"{}", length=2**22 + 1), 2**23),
                "header has 4,194,305 bytes",
            ),
            "1 TB of zeros": (sparse(bytes(8), 2**40), "header has 0 bytes"),
            "1 TB of zeros behind a header": (
                sparse(b"", 2**40),
                "its tensors end at byte",
                "1,099,511,627,776",
            ),
        },
    ),
    *with_common_words(
        OSError,
        [WEIGHTS, "header"],
        {
            "header of zeros": (weights(raw(bytes(100))), "not JSON"),
            "header of spaces": (weights(raw(b" " * 100)), "not JSON"),
            "header that is not JSON": (weights(raw(b"{weights}")), "not JSON"),
            "header cut short": (weights(raw(b'{"a":{"dtype":"F32"')), "not JSON"),
            "header overwritten with zeros": (
                weights(lambda folder: whole(folder)[:2000] + bytes(9000)),
                "not JSON",
            ),
            "header with more behind it": (weights(raw(b"{}{}")), "not JSON (Extra data"),
            "header with NaN": (weights(raw(b'{"a":NaN}')), "NaN is not a number"),
            "header in bad UTF-8": (weights(raw(b'{"\xff":1}')), "utf-8"),
            "header in UTF-16": (weights(raw("{}".encode("utf-16"))), "utf-8"),
            "header with a byte-order mark": (weights(raw(b"\xef\xbb\xbf{}")), "BOM"),
            "header is a list": (weights(raw([])), "holds a list"),
            "header is a string": (weights(raw("weights")), "holds a str"),
            "header is null": (weights(raw(None)), "holds a NoneType"),
            "header nested 60 000 deep": (weights(raw(b'{"a":' + b"[" * 60_000)), "nested too deeply"),
            "header nested 100 000 deep": (
                weights(raw(b'{"a":' + b"[" * 100_000)),
                "100,001 lists and objects",
            ),
            "a tensor twice, differing": (
                weights(raw(b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"a":5}', bytes(8))),
                "duplicate key a",
            ),
            "a tensor twice, identical": (
                weights(raw(b'{"a":%s,"a":%s}' % ((json.dumps(entry()).encode(),) * 2), bytes(8))),
                "duplicate key a",
            ),
            "a dtype twice": (
                weights(
                    raw(b'{"a":{"dtype":"F32","dtype":"F32","shape":[2],"data_offsets":[0,8]}}', bytes(8))
                ),
                "duplicate key dtype",
            ),
            "a key of a million characters twice": (
                weights(raw(f'{{"{MILLION_LETTERS}":1,"{MILLION_LETTERS}":1}}'.encode())),
                "duplicate key",
            ),
        },
    ),
    *with_common_words(
        OSError,
        [WEIGHTS, "a is not described by dtype, shape and data_offsets"],
        {
            "tensor described by a number": described(5),
            "tensor described by null": described(None),
            "tensor described by a list 500 deep": described(json.loads(DEEP)),
            "tensor without a dtype": described({"shape": [2], "data_offsets": [0, 8]}),
            "tensor without a shape": described({"dtype": "F32", "data_offsets": [0, 8]}),
            "tensor without offsets": described({"dtype": "F32", "shape": [2]}),
            "tensor with an unknown field": described(entry() | {"url": "x"}),
        },
    ),
    *with_common_words(
        OSError,
        [WEIGHTS, "a lacks a shape of at most 8 possible sizes"],
        {
            "shape of strings": described(entry(["2"])),
            "shape of booleans": described(entry([True, 2])),
            "shape with a fraction": described(entry([2.0])),
            "shape with a negative size": described(entry([-2])),
            "two negative sizes whose product fits": described(entry([-1, -2])),
            "shape is null": described(entry(None)),
            "shape is a number": described(entry(2)),
            "rank 9": described(entry([1] * 8 + [2])),
            "rank 10 000": described(entry([1] * 9999 + [2])),
            "rank 1 000 000": described(entry([1] * 999_999 + [2])),
            "sizes whose product overflows": described(entry([2**32, 2**32, 2])),
            "sizes whose product overflows but for a zero": described(
                entry([0, 2**40, 2**40], (0, 0)), body=0
            ),
            "size whose bytes overflow to a size that fits": described(entry([2**62 + 2])),
        },
    ),
    *with_common_words(
        OSError,
        [WEIGHTS, "is out of range"],
        {
            "size of 4 000 digits": described(entry([LONG])),
            "sizes of 4 000 digits and no bytes": described(entry([0] + [LONG] * 7, (0, 0)), body=0),
            "offsets of 4 300 digits": described(entry([0], [10**4300 - 1] * 2)),
        },
    ),
    *with_common_words(
        OSError,
        [WEIGHTS, "a has offsets that do not fit its shape"],
        {
            "offsets reversed": described(entry(offsets=(8, 0))),
            "offsets negative": described(entry(offsets=(-8, 0))),
            "three offsets": described(entry(offsets=(0, 8, 8))),
            "one offset": described(entry(offsets=(8,))),
            "offsets are null": described(entry(offsets=None)),
            "offsets are fractions": described(entry(offsets=(0.0, 8.0))),
            "offsets for fewer values": described(entry([3])),
            "offsets for a wider dtype": described(entry(dtype="BF16")),
        },
    ),
    *with_common_words(
        OSError,
        [WEIGHTS],
        {
            "tensors overlap": (
                described(entry(), entry(offsets=(4, 12)), body=12),
                "b begins at byte",
                "overlap",
            ),
            "two tensors of the same bytes": (described(entry(), entry()), "b begins at byte", "overlap"),
            "tensors leave a gap": (
                described(entry(), entry(offsets=(12, 20)), body=20),
                "b begins at byte",
                "gap",
            ),
            "gap before the first tensor": (
                described(entry(offsets=(8, 16)), body=16),
                "a begins at byte",
                "gap",
            ),
            "name of a million characters out of place": (
                weights(raw({MILLION_LETTERS: entry(offsets=(8, 16))}, bytes(16))),
                "aaa begins at byte",
            ),
            "offsets past the end": (
                described(entry([2000], (0, 8000))),
                "its tensors end at byte",
                "the file at",
            ),
            "bytes behind the last tensor": (
                weights(lambda folder: whole(folder) + b"x"),
                "1 byte too long: its tensors end at byte",
            ),
            "metadata is a list": (
                header(lambda found: found.update(__metadata__=[])),
                "metadata are not strings",
            ),
            "metadata with a number": (
                header(lambda found: found.update(__metadata__={"a": 1})),
                "metadata are not strings",
            ),
        },
    ),
    *with_common_words(
        OSError,
        ["config in the weights"],
        {
            "config in the weights is empty": (saved_with(""), "not JSON"),
            "config in the weights is a list": (saved_with("[]"), "holds a list"),
            "config in the weights nested 60 000 deep": (saved_with("[" * 60_000), "nested too deeply"),
            "config in the weights with a lone surrogate": (saved_with('{"a": "\ud800"}'), "utf-8"),
            "config in the weights of a million characters": (
                saved_with(json.dumps({"a": MILLION_LETTERS})),
                "more than 65,536 bytes",
            ),
        },
    ),
    *with_common_words(
        ValueError,
        [CONFIG],
        {
            "config in the weights with a nameless key": (saved_with('{"": 1}'), " is None, was 1"),
            "config in the weights nested 500 deep": (
                saved_with('{"num_layers":' + DEEP + "}"),
                "num_layers is 1, was [[[",
            ),
            "config in the weights with a long name": (
                saved_with(json.dumps({MILLION_LETTERS[:60_000]: 1})),
                "aaa",
            ),
            "config in the weights with an escape": (saved_with('{"\\u001b[2J": 1}'), r"\x1b[2J"),
        },
    ),
    *each(
        "dtype {}",
        lambda dtype: described(entry(dtype=dtype)),
        ("F31", "f32", "", "\x1b[2J", 32, None, ["F32"], "F" * 100_000),
        ValueError,
        WEIGHTS,
        "a is stored as ",
        "expected F32, F16, BF16",
    ),
    *[
        (
            f"weights in {stored}",
            changed(dtype=dtype),
            ValueError,
            WEIGHTS,
            f"proj_out.bias is stored as {stored},",
        )
        for stored, dtype in {
            "I64": torch.int64,
            "I8": torch.int8,
            "BOOL": torch.bool,
            "F8_E4M3": torch.float8_e4m3fn,
            "F8_E5M2": torch.float8_e5m2,
            "F64": torch.float64,
        }.items()
    ],
    *each(
        "weights cut short after {} bytes",
        cut,
        (9, 100, *range(4096, 46_000, 4096), -1),
        OSError,
        WEIGHTS,
        "not a complete",
    ),
]

BAD_TENSORS = [
    *with_common_words(
        ValueError,
        [WEIGHTS, "proj_out.bias holds NaN or infinity"],
        {
            "NaN": changed(values=[math.nan]),
            "infinity": changed(values=[math.inf]),
            "minus infinity": changed(values=[-math.inf]),
            "plus and minus infinity": changed(values=[math.inf, -math.inf]),
            "NaN in bfloat16": changed(dtype=torch.bfloat16, values=[math.nan]),
            "infinity in float16": changed(dtype=torch.float16, values=[math.inf]),
            "NaN with disable_mmap": both(changed(values=[math.nan]), called_with(disable_mmap=True)),
        },
    ),
    *with_common_words(
        ValueError,
        [WEIGHTS, CONFIG, "keys differ"],
        {
            "no tensors": (weights(raw({})), "Missing: patch_embedding.weight"),
            "one key missing": (
                tensors(lambda found: found.pop("proj_out.bias")),
                "Missing: proj_out.bias; unknown: none",
            ),
            "one block missing": (renamed("blocks.0.", "."), "Missing: blocks.0.", "and more"),
            "one extra key": (more(teacher__weight=(1,)), "Missing: none; unknown: teacher.weight"),
            "one extra key without values": (more(empty=(0,)), "unknown: empty"),
            "one extra key without a name": (
                tensors(lambda found: found.update({"": torch.zeros(1)})),
                "unknown: ",
            ),
            "one extra block": (renamed("blocks.0.", "blocks.1.", is_kept=True), "unknown: blocks.1."),
            "one block under two numbers": (
                renamed("blocks.0.", "blocks.00.", is_kept=True),
                "unknown: blocks.00.",
            ),
            "a block of a large number": (
                renamed("blocks.0.", f"blocks.{10**30}."),
                f"unknown: blocks.{10**30}.",
            ),
            "an adapter among the weights": (
                more(proj_out__lora_A__default__weight=(1,)),
                "unknown: proj_out.lora_A.default",
            ),
            "key of a million characters": (
                weights(raw({MILLION_LETTERS: entry()}, bytes(8))),
                "unknown: aaa",
            ),
            "key that clears the terminal": (
                weights(raw({"\x1b[2J": entry()}, bytes(8))),
                r"unknown: '\x1b[2J'",
            ),
            "key that is a lone surrogate": (
                weights(raw({"\ud800": entry()}, bytes(8))),
                r"unknown: '\ud800'",
            ),
            "1 TB in the header, not in the config": (
                zeros_of(hidden_size=65536, ffn_dim=65536, depth=4),
                "unknown: blocks.1.",
            ),
        },
    ),
    *each(
        "keys renamed with {}",
        partial(renamed, ""),
        ("module.", "_orig_mod.", "ema.", "model.", "transformer."),
        ValueError,
        WEIGHTS,
        "inside a wrapper, such as ",
        "Only the prefixes of a wrapper differ: save the model inside",
    ),
    (
        "keys renamed inside a block",
        renamed("blocks.0.", "blocks.0._orig_mod."),
        ValueError,
        WEIGHTS,
        "Only the prefixes of a wrapper differ",
    ),
    (
        "keys renamed and one missing",
        both(tensors(lambda found: found.pop("proj_out.bias")), renamed("", "module.")),
        ValueError,
        WEIGHTS,
        "belong to another model or were renamed",
    ),
    *with_common_words(
        ValueError,
        [WEIGHTS, f"{CONFIG} implies"],
        {
            "wrong shape": (zeros_of({"proj_out.bias": (15,)}), "proj_out.bias is (15,)", "implies (16,)"),
            "a matrix transposed": (
                changed("blocks.0.ffn.net.0.proj.weight", shape=(16, 32)),
                "implies (32, 16)",
            ),
            "an extra dimension": (changed(shape=(1, 16)), "proj_out.bias is (1, 16)"),
            "a scalar": (zeros_of({"proj_out.bias": ()}), "proj_out.bias is ()"),
            "no values": (zeros_of({"proj_out.bias": (0,)}), "proj_out.bias is (0,)"),
            "one tensor of 1 TB": (zeros_of({"proj_out.bias": (2**38,)}), "proj_out.bias is (274877906944,)"),
        },
    ),
    *with_common_words(
        OSError,
        [WEIGHTS, "holds 11,", "this machine has"],
        {
            "11 TB that the config agrees with": both(settings(**HUGE), zeros_of(**HUGE)),
            "11 TB that the config agrees with, pinned": both(
                settings(**HUGE), zeros_of(**HUGE), called_with(sha256="0" * 64)
            ),
        },
    ),
]


@pytest.mark.parametrize("broken, error, words", rows(BAD_HEADERS, BAD_TENSORS))
def test_broken_weights_are_rejected_at_once_by_name(broken, error, words, sound_folder):
    check_broken(sound_folder, broken, error, words)
