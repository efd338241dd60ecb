"""Saved students with a broken config: each is rejected at once and by name."""

from functools import partial

import pytest

from tests.broken_students import (
    CONFIG,
    DEEP,
    LONG,
    WEIGHTS,
    absent,
    added,
    both,
    config,
    each,
    setting_text,
    settings,
    wan_setting,
    whole,
    with_common_words,
    without_metadata,
)
from tests.refusals import check_broken, rows

SIZES = (
    "hidden_size",
    "depth",
    "num_heads",
    "ffn_dim",
    "num_channels",
    "text_dim",
    "freq_dim",
    "rope_max_seq_len",
)
INVALID_SIZES = (
    "0",
    "-1",
    "65537",
    "10000000",
    str(2**64),
    '"4"',
    "4.5",
    "4.0",
    "1e400",
    "true",
    "[16]",
    "{}",
    str(LONG),
    DEEP,
)
BAD_CONFIG = [
    ("config missing", absent(CONFIG), OSError, "no config.json", f"found {WEIGHTS}"),
    *with_common_words(
        OSError,
        [CONFIG],
        {
            "config empty": (config(b""), "not JSON"),
            "config of blanks": (config(b" \n"), "not JSON"),
            "config cut short": (config('{"hidden_size":'), "not JSON"),
            "config in Python": (config("{'depth': 1}"), "not JSON"),
            "config with a comment": (config('{"depth": 1} // comment'), "not JSON"),
            "config that is the weights": (config(whole), "not JSON"),
            "config with a byte-order mark": (config(b"\xef\xbb\xbf{}"), "BOM"),
            "config in bad UTF-8": (config(b'{"\xff": 1}'), "utf-8"),
            "config in UTF-16": (config("{}".encode("utf-16")), "utf-8"),
            "config of 70 000 bytes": (config(b" " * 70_000), "70,000 bytes, too large"),
            "config with a key twice, differing": (config('{"depth": 1, "depth": 2}'), "duplicate key depth"),
            "config with a key twice, identical": (config('{"depth": 1, "depth": 1}'), "duplicate key depth"),
            "config nested 60 000 deep": (config("[" * 60_000), "nested too deeply"),
            "config nested 100 000 deep": (config("[" * 100_000), "100,000 bytes, too large"),
            "config of objects nested 10 000 deep": (config('{"a":' * 10_000), "nested too deeply"),
            "a size of 5 000 digits": (setting_text("depth", "9" * 5000), "4300 digits"),
        },
    ),
    *[
        (f"config is {text}", config(text), OSError, CONFIG, f"holds a {kind}")
        for text, kind in (
            ("[]", "list"),
            ('"organisation/model"', "str"),
            ("5", "int"),
            ("5.5", "float"),
            ("null", "NoneType"),
            ("true", "bool"),
        )
    ],
    *each(
        "a setting that is {}",
        lambda text: setting_text("eps", text),
        ("NaN", "Infinity", "-Infinity"),
        OSError,
        CONFIG,
        "is not a number",
    ),
    *[
        row
        for name in SIZES
        for row in each(
            f"{name} is {{:.40}}",
            partial(setting_text, name),
            INVALID_SIZES,
            ValueError,
            f"{name} is ",
            "expected a whole number from 1 to 65536",
        )
    ],
    *each(
        "{} is null",
        lambda name: setting_text(name, "null"),
        [name for name in SIZES if name != "ffn_dim"],
        ValueError,
        " is None",
        "whole number",
    ),
    *[
        (f"{name} is {value!r}", wan_setting(name, value), ValueError, f"{ours} is {value!r}")
        for name, value, ours in (
            ("num_attention_heads", 0, "num_attention_heads"),
            ("attention_head_dim", "8", "attention_head_dim"),
            ("attention_head_dim", 10**7, "attention_head_dim"),
            ("num_layers", 10**6, "depth"),
            ("num_layers", [1], "depth"),
            ("in_channels", True, "num_channels"),
        )
    ],
    *with_common_words(
        ValueError,
        [],
        {
            "depth of 10^6 under both names": (settings(depth=10**6, num_layers=10**6), "depth is 1000000"),
            "width that heads do not divide": (
                settings(num_heads=3),
                "hidden_size 16 over 3 heads",
                "--num_heads",
            ),
            "heads of an odd size": (settings(num_heads=16), "1 channels per head", "rotary"),
            "more heads than channels": (settings(num_heads=32), "hidden_size 16 over 32 heads"),
            "freq_dim odd": (settings(freq_dim=255), "freq_dim is 255"),
            "rope_max_seq_len of 65 536": (
                settings(rope_max_seq_len=65536),
                "rope_max_seq_len is 65536",
                "16384",
            ),
            "ffn_dim derived from a width of 65 536": (
                settings(hidden_size=65536, ffn_dim=None),
                "ffn_dim is 262144",
            ),
        },
    ),
    *each(
        "patch_size is {}",
        lambda value: settings(patch_size=value),
        (
            [2, 2, 2],
            [1, 2],
            [1, 2, 2, 2],
            [1, 0, 2],
            [1, -2, 2],
            [1, 2.0, 2],
            [True, 2, 2],
            [1, "2", 2],
            2,
            "1,2,2",
            None,
            {},
            [],
            [1, 10**7, 10**7],
            [1, [2], 2],
        ),
        ValueError,
        "patch_size",
    ),
    *each(
        "eps is {}",
        lambda value: settings(eps=value),
        (0, 0.0, -1e-6, 1, 1.5, "1e-6", None, True, [], 1e300),
        ValueError,
        "eps is ",
        "expected a small positive number",
    ),
    *each(
        "cross_attn_norm is {}",
        lambda value: settings(cross_attn_norm=value),
        (0, 1, None, "true", []),
        ValueError,
        "cross_attn_norm is ",
    ),
    *each(
        "qk_norm is {}",
        lambda value: settings(qk_norm=value),
        (None, "layer_norm", True, 5, []),
        ValueError,
        "qk_norm ",
    ),
    *each(
        "_class_name is {:.40}",
        lambda value: settings(_class_name=value),
        (
            "UNet2DConditionModel",
            "wanlitestudent",
            "",
            "os.system",
            "\x1b[2J",
            "x" * 60_000,
            None,
            5,
            ["WanLiteStudent"],
            {"a": 1},
        ),
        ValueError,
        CONFIG,
        "is the config of a ",
        "expected WanLiteStudent or WanTransformer3DModel",
    ),
    *each(
        "quantization_config is {}",
        lambda value: settings(quantization_config=value),
        (
            {"quant_method": "bitsandbytes", "load_in_4bit": True},
            {"quant_method": "os.system"},
            {},
            [],
            "int8",
            False,
        ),
        ValueError,
        CONFIG,
        "has a quantization_config",
        "Quantise",
    ),
    (
        "quantization_config beside the saved settings",
        added(quantization_config={"quant_method": "gguf"}),
        ValueError,
        CONFIG,
        "Quantise",
    ),
    *[
        (
            f"the config has {name} {value}, the weights have another",
            settings(**{name: value}),
            ValueError,
            WEIGHTS,
            CONFIG,
            "implies",
        )
        for name, value in (
            ("hidden_size", 32),
            ("hidden_size", 65536),
            ("depth", 2),
            ("depth", 65536),
            ("num_channels", 8),
            ("num_channels", 65536),
            ("text_dim", 16),
            ("freq_dim", 128),
            ("ffn_dim", 64),
            ("ffn_dim", None),
            ("patch_size", [1, 4, 4]),
            ("patch_size", [1, 1, 4]),
            ("patch_size", [1, 65536, 65536]),
            ("cross_attn_norm", False),
        )
    ],
    ("the config is an empty object", config("{}"), ValueError, WEIGHTS, CONFIG, "Missing: "),
    *[
        (
            f"the weights were saved with another {name}",
            added(**{name: value}),
            ValueError,
            CONFIG,
            f"{name} is {value}, was ",
        )
        for name, value in {
            "num_attention_heads": 4,
            "eps": 1e-05,
            "rope_max_seq_len": 64,
            "num_layers": 60000,
            "attention_head_dim": 32,
        }.items()
    ],
    *[
        (
            f"{ours} has two different values",
            both(without_metadata, added(**changes)),
            ValueError,
            f"{ours} is ",
            "but under its Wan names",
        )
        for ours, changes in {
            "depth": {"depth": 2},
            "num_heads": {"num_heads": 4},
            "hidden_size": {"hidden_size": 8},
            "num_channels": {"in_channels": 8},
        }.items()
    ],
    (
        "channels in and out differ",
        both(without_metadata, added(out_channels=8)),
        ValueError,
        "num_channels is 4, but under its Wan names 8",
    ),
]


@pytest.mark.parametrize("broken, error, words", rows([(*row, CONFIG) for row in BAD_CONFIG]))
def test_a_broken_config_is_rejected_at_once_by_name(broken, error, words, sound_folder):
    check_broken(sound_folder, broken, error, words)
