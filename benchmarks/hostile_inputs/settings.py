"""Settings that decide an image: they are those of the training, or refused."""

import json

from benchmarks.hostile_inputs.builders import ENCODER, SETTINGS, TOKENIZER, TOKENIZER_CONFIG, VAE, edit
from benchmarks.hostile_inputs.trial import PROMPT, REFUSED, SAME, Input, draw


def other_images() -> list[Input]:
    kind = "other images"

    def batch(prepare):
        def with_batch(place):
            path = place.beside / "prompts.txt"
            path.write_text(f"{PROMPT}\na blue cross\na ring\n{PROMPT} and a ring")
            prepare(place)
            return ["--prompts_file", path, "--batch_size", 4]

        return with_batch

    def keeping_manifest(name, **changes):
        def prepare(place):
            path = place.student / name
            path.write_text(json.dumps(json.loads(path.read_text()) | changes))

        return prepare

    def random_tokens(place):
        model = json.loads((place.student / TOKENIZER).read_text())["model"]
        edit(TOKENIZER, model=model | {"type": "BPE", "merges": [], "dropout": 0.5})(place)

    rows = [
        ("thresholding", REFUSED, edit(SETTINGS, thresholding=True), draw),
        ("padding on the left", SAME, edit(TOKENIZER_CONFIG, padding_side="left"), draw),
        (
            "padding on the left by the tokenizer",
            SAME,
            edit(
                TOKENIZER,
                padding={
                    "strategy": "BatchLongest",
                    "direction": "Left",
                    "pad_to_multiple_of": None,
                    "pad_id": 0,
                    "pad_type_id": 0,
                    "pad_token": "<pad>",
                },
            ),
            draw,
        ),
        (
            "truncation to two tokens",
            SAME,
            edit(
                TOKENIZER,
                truncation={"direction": "Left", "max_length": 2, "strategy": "LongestFirst", "stride": 0},
            ),
            draw,
        ),
        ("a length of two tokens", SAME, edit(TOKENIZER_CONFIG, model_max_length=2), draw),
        (
            "a lower-case setting of the tokenizer",
            REFUSED,
            keeping_manifest(TOKENIZER_CONFIG, do_lower_case=False),
            draw,
        ),
        ("tokens at random", REFUSED, random_tokens, draw),
        ("another epsilon of the text encoder", REFUSED, edit(ENCODER, layer_norm_epsilon=0.1), draw),
        (
            "another activation of the text encoder",
            REFUSED,
            edit(ENCODER, feed_forward_proj="gated-silu", dense_act_fn="silu"),
            draw,
        ),
        (
            "another distance of the text encoder",
            REFUSED,
            edit(ENCODER, relative_attention_max_distance=8),
            draw,
        ),
        ("a text encoder in half precision", SAME, keeping_manifest(ENCODER, dtype="bfloat16"), draw),
        ("dropout in the autoencoder", SAME, edit(VAE, dropout=0.5), draw),
        ("dropout in the text encoder", SAME, edit(ENCODER, dropout_rate=0.5), draw),
        ("another order of the solver", REFUSED, edit(SETTINGS, solver_order=2), draw),
        ("another spacing of timesteps", REFUSED, edit(SETTINGS, timestep_spacing="trailing"), draw),
        ("a shift of the last step", REFUSED, edit(SETTINGS, shift_terminal=0.1), draw),
        ("an unknown setting of the scheduler", REFUSED, edit(SETTINGS, evil=1), draw),
        ("another epsilon of the student", REFUSED, edit("config.json", eps=0.1), draw),
        ("another patch of the student", REFUSED, edit("config.json", patch_size=[1, 1, 4]), draw),
        ("another stride of the autoencoder", REFUSED, edit(VAE, scale_factor_spatial=16), draw),
        (
            "other statistics of the autoencoder",
            REFUSED,
            keeping_manifest(VAE, latents_mean=[0.1] * 16),
            draw,
        ),
    ]
    return [Input(kind, *row) for row in rows]
