"""Wan's text encoder, a UMT5 -> a smaller UMT5 that starts from its weights, and the student's layer that reads it.

UMT5 has no biases and normalises by size only, so a change of basis is exact once the gains of the norms are folded
into the matrices after them (SliceGPT, Ashkboos et al. 2024). The hidden states are kept in their principal
directions; consecutive blocks become one, with the heads and neurons that write most energy; the output matrices are
refitted by ridge regression, from the small encoder's own states to the large one's.

Legend: B prompts, L text length, D d widths of the large and of the small encoder, R rows: all tokens of all prompts,
without padding. The large encoder's blocks are visited twice, in order, and read from the disk one at a time.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import UMT5Config, UMT5EncoderModel
from transformers.models.umt5.modeling_umt5 import UMT5Block, UMT5LayerNorm

from ..data.component_files import loading_errors
from ..files.file_names import CONFIG
from ..files.json_files import DOWNLOADED, read_json
from ..student.regression import solve_ridge
from ..teacher.components import find_weight_files
from ..teacher.names import TIED

MAX_WIDTH = 768  # with the vocabulary of UMT5-XXL, 0.4 GB of embeddings in bf16
ROWS_AT_ONCE = 8192  # of the embeddings, which are a fifth of UMT5-XXL
RIDGE = 1e-4  # relative to the mean diagonal of the Gram matrix


@dataclass(frozen=True)
class TextShape:
    """Width, blocks, heads and neurons of a small encoder; the size of its heads is the large one's."""

    width: int
    depth: int
    heads: int
    ffn: int


@dataclass
class Tokens:
    """Prompts: token numbers (B, L), and which are no padding (B, L)."""

    ids: Tensor
    mask: Tensor

    @property
    def logit_bias(self) -> Tensor:
        """The additive mask (B, 1, 1, L) of attention."""
        lowest = torch.finfo(torch.float32).min
        bias = torch.zeros(self.mask.shape, device=self.mask.device)
        return bias.masked_fill(~self.mask.bool(), lowest)[:, None, None]

    def take(self, rows: Tensor) -> "Tokens":
        """Return the prompts of these rows, padded to the longest of them."""
        mask = self.mask[rows]
        length = int(mask.sum(1).max())
        return Tokens(self.ids[rows, :length], mask[:, :length])

    def rows(self, states: Tensor) -> Tensor:
        """Return the states (R, ...) of (B, L, ...) that are no padding."""
        return states[self.mask.bool()]


def default_shape(config: Any, width: int | None = None) -> TextShape:
    """Return the shape of a small encoder: by default half as wide, at most MAX_WIDTH, and half as deep."""
    width = width or min(MAX_WIDTH, config.d_model // 2)
    share = width / config.d_model
    return TextShape(
        width,
        max(1, config.num_layers // 2),
        max(1, round(share * config.num_heads)),
        max(1, round(share * config.d_ff)),
    )


class EncoderFiles:
    """A UMT5 encoder on disk, of which one block at a time is read, in float32.

    Raises OSError for files that cannot be read; load_text_encoder() compares them with config and manifest.
    """

    def __init__(self, folder: str | Path):
        place = Path(folder) / "text_encoder"
        with loading_errors(place):
            self.config = UMT5Config.from_dict(read_json(place / CONFIG, DOWNLOADED))
            self._paths: dict[str, Path] = {}
            for path in find_weight_files("text_encoder", place):
                with safe_open(path, "pt") as file:
                    self._paths |= dict.fromkeys(file.keys(), path)
        self._embedding = next(name for name in sorted(TIED, reverse=True) if name in self._paths)

    def embed(self, ids: Tensor) -> Tensor:
        """Return the embeddings (B, L, D) of tokens."""
        with self._open(self._embedding) as file:  # mapped: only these rows are read
            return file.get_tensor(self._embedding)[ids.cpu()].float().to(ids.device)

    def embed_all(self, basis: Tensor) -> Tensor:
        """Return the embeddings (vocabulary, d) of all tokens in a basis (D, d)."""
        found = []
        for start in range(0, self.config.vocab_size, ROWS_AT_ONCE):
            with self._open(self._embedding) as file:
                rows = file.get_slice(self._embedding)[start : start + ROWS_AT_ONCE]
                found.append(rows.float() @ basis.cpu())
        return torch.cat(found)

    def blocks(self, device: str | torch.device) -> Iterator[Any]:
        """Yield the blocks in order."""
        self.config._attn_implementation = "sdpa"
        for number in range(self.config.num_layers):
            with torch.device("meta"):
                block = UMT5Block(self.config, layer_idx=number)
            yield self._read(block, f"encoder.block.{number}.").to(device)

    def final_norm(self) -> Any:
        with torch.device("meta"):
            norm = UMT5LayerNorm(self.config.d_model, eps=self.config.layer_norm_epsilon)
        return self._read(norm, "encoder.final_layer_norm.")

    def _read(self, module, prefix):
        tensors = {}
        for name in module.state_dict():
            with self._open(prefix + name) as file:
                tensors[name] = file.get_tensor(prefix + name).to(torch.float32, copy=True)
        module.load_state_dict(tensors, assign=True)
        return module.eval().requires_grad_(False)

    def _open(self, name):
        """Open the file of a tensor; it is closed after each, so that its pages do not stay in memory."""
        return safe_open(self._paths[name], "pt")


@torch.no_grad()
def project_text_encoder(
    large: EncoderFiles, shape: TextShape, tokens: Tokens, reader: Tensor
) -> tuple[Any, Tensor]:
    """Return a small encoder and the matrix (out, d) that reads it as `reader` (out, D) reads `large`.

    `tokens` are those of a few hundred prompts. Raises ValueError if the shape exceeds the large encoder's.
    """
    check_shape(large.config, shape)
    device = tokens.ids.device
    small = make_small(large.config, shape).to(device)
    states = large.embed(tokens.ids)
    basis = find_basis(states, large.blocks(device), tokens, shape.width)
    small.shared.weight.copy_(large.embed_all(basis))

    own_states, blocks = states @ basis, large.blocks(device)
    for own_block, length in zip(small.encoder.block, split_blocks(large.config.num_layers, shape.depth)):
        starts, span = states, []
        for block in islice(blocks, length):
            span.append(Observed(block, tokens))
            states = span[-1].observe(states)
        attended = starts + sum(each.attention_update for each in span)
        own_states = fit_attention(own_block.layer[0], span, basis, (starts, attended), own_states, tokens)
        own_states = fit_neurons(own_block.layer[1], span, basis, (attended, states), own_states, tokens)
    own_norm = small.encoder.final_layer_norm
    fit_norm(own_norm, tokens.rows(states), tokens.rows(own_states))
    read = tokens.rows(large.final_norm().to(device)(states)) @ reader.T.to(states.dtype)
    weight, _ = solve_ridge(tokens.rows(own_norm(own_states)), read, RIDGE, has_bias=False)
    return small, weight


def check_shape(config: Any, shape: TextShape) -> None:
    """Raise ValueError unless a small encoder of this shape can be made of a large one."""
    for name, value, largest in (
        ("width", shape.width, config.d_model),
        ("depth", shape.depth, config.num_layers),
        ("heads", shape.heads, config.num_heads),
        ("neurons", shape.ffn, config.d_ff),
    ):
        if not 1 <= value <= largest:
            raise ValueError(
                f"a text encoder with {name} {value} cannot be made of one with {largest}, expected 1 to {largest}."
            )


def make_small(config: Any, shape: TextShape) -> Any:
    """Return an encoder of a shape with new weights."""
    changed = {"d_model": shape.width, "num_layers": shape.depth, "num_heads": shape.heads, "d_ff": shape.ffn}
    changed["num_decoder_layers"] = shape.depth
    small = UMT5EncoderModel(UMT5Config(**{**config.to_dict(), **changed, "dtype": "float32"})).float()
    return small.eval().requires_grad_(False)


def split_blocks(num_blocks: int, depth: int) -> list[int]:
    """Return the number of consecutive blocks that each block of the small encoder replaces."""
    ends = [round(num_blocks * (number + 1) / depth) for number in range(depth)]
    return [end - start for start, end in zip([0, *ends], ends)]


def find_basis(states: Tensor, blocks: Iterable[Any], tokens: Tokens, width: int) -> Tensor:
    """Return the principal directions (D, width) of the states before and after each block.

    Each block counts alike, although states grow from block to block: norms divide by their size.
    """
    moments = states.new_zeros(states.shape[-1], states.shape[-1], dtype=torch.float64)
    for block in (None, *blocks):
        if block is not None:
            states = Observed(block, tokens).observe(states)
        rows = tokens.rows(states).double()
        moments += rows.T @ rows / rows.square().sum()
    return torch.linalg.eigh(moments).eigenvectors[:, -width:].float()


class Observed:
    """A block of the large encoder, and what its heads and neurons write (rows of all tokens)."""

    def __init__(self, block: Any, tokens: Tokens):
        self.attention, self.neurons = block.layer
        self.tokens = tokens

    def observe(self, states: Tensor) -> Tensor:
        """Return the states (B, L, D) after the block."""
        attend, feed = self.attention.SelfAttention, self.neurons.DenseReluDense
        with recorded(attend.o) as of_heads:
            update = attend(self.attention.layer_norm(states), attention_mask=self.tokens.logit_bias)[0]
        self.attention_update = update
        states = states + update
        with recorded(feed.wo) as of_neurons:
            update = feed(self.neurons.layer_norm(states))
        self.head_energy = self._energy(of_heads[0], attend.o.weight, attend.key_value_proj_dim)
        self.neuron_energy = self._energy(of_neurons[0], feed.wo.weight, 1)
        return states + update

    def _energy(self, written, output, size):
        """Return the mean energy that each head or neuron of `size` values writes into the states."""
        rows = self.tokens.rows(written).float()  # (R, heads * size)
        values = rows.unflatten(1, (-1, size)).transpose(0, 1)  # (heads, R, size)
        outputs = output.float().unflatten(1, (-1, size)).permute(1, 2, 0)  # (heads, size, D)
        products, squares = outputs @ outputs.mT, values.mT @ values  # (heads, size, size)
        return (products * squares).sum((1, 2)) / len(rows)


class recorded:
    """Records the inputs of a layer within the context."""

    def __init__(self, layer: Any):
        self.layer = layer

    def __enter__(self) -> list[Tensor]:
        inputs: list[Tensor] = []
        self.hook = self.layer.register_forward_pre_hook(lambda module, given: inputs.append(given[0]))
        return inputs

    def __exit__(self, *exception: Any) -> None:
        self.hook.remove()


def fit_norm(norm: Any, rows: Tensor, own_rows: Tensor) -> None:
    """Set the gain of a small norm, which divides by the size of fewer directions."""
    size, own_size = (each.float().square().mean(-1).sqrt() for each in (rows, own_rows))
    norm.weight.fill_((own_size / size).mean())


def fit_attention(
    own: Any, span: list[Observed], basis: Tensor, states: tuple, own_states: Tensor, tokens: Tokens
) -> Tensor:
    """Fit the attention of a small block to that of all blocks of its span; returns the states after it.

    `states` are those of the large encoder (B, L, D) before and after the attention.
    """
    before, after = states
    attend = own.SelfAttention
    size = attend.key_value_proj_dim
    energy = torch.cat([block.head_energy for block in span])
    chosen = energy.topk(attend.n_heads).indices.sort().values.cpu()
    columns = (chosen[:, None] * size + torch.arange(size)).flatten()
    for name in ("q", "k", "v"):
        joined = fold([each.attention for each in span], f"SelfAttention.{name}")
        getattr(attend, name).weight.copy_(joined[columns] @ basis)
    outputs = torch.cat([each.attention.SelfAttention.o.weight for each in span], 1)
    attend.o.weight.copy_(basis.T @ outputs[:, columns].float())
    biases = [each.attention.SelfAttention.relative_attention_bias.weight for each in span]
    attend.relative_attention_bias.weight.copy_(torch.cat(biases, 1)[:, chosen])
    fit_norm(own.layer_norm, tokens.rows(before), tokens.rows(own_states))
    with recorded(attend.o) as inputs:
        update = attend(own.layer_norm(own_states), attention_mask=tokens.logit_bias)[0]
    refit(attend.o, tokens.rows(inputs[0]), tokens.rows(after @ basis - own_states - update))
    return own_states + attend.o(inputs[0])


def fit_neurons(
    own: Any, span: list[Observed], basis: Tensor, states: tuple, own_states: Tensor, tokens: Tokens
) -> Tensor:
    """Fit the neurons of a small block to those of all blocks of its span; returns the states after them.

    `states` are those of the large encoder (B, L, D) before and after the neurons.
    """
    before, after = states
    feed = own.DenseReluDense
    energy = torch.cat([block.neuron_energy for block in span])
    chosen = energy.topk(feed.wo.in_features).indices.sort().values.cpu()
    for name in ("wi_0", "wi_1"):
        joined = fold([each.neurons for each in span], f"DenseReluDense.{name}")
        getattr(feed, name).weight.copy_(joined[chosen] @ basis)
    outputs = torch.cat([each.neurons.DenseReluDense.wo.weight for each in span], 1)
    feed.wo.weight.copy_(basis.T @ outputs[:, chosen].float())
    fit_norm(own.layer_norm, tokens.rows(before), tokens.rows(own_states))
    with recorded(feed.wo) as inputs:
        update = feed(own.layer_norm(own_states))
    refit(feed.wo, tokens.rows(inputs[0]), tokens.rows(after @ basis - own_states - update))
    return own_states + feed.wo(inputs[0])


def fold(layers: list, name: str) -> Tensor:
    """Return the weights (out, D) of the matrix `name` of all layers, with the gains of the norms before them."""
    gains = [layer.layer_norm.weight.float() for layer in layers]
    return torch.cat([layer.get_submodule(name).weight.float() * gain for layer, gain in zip(layers, gains)])


def refit(layer: Any, inputs: Tensor, residual: Tensor) -> None:
    """Refit a layer in place by ridge regression from its inputs (R, in) to the residuals (R, out) of its outputs."""
    change, _ = solve_ridge(inputs, residual, RIDGE, has_bias=False)
    layer.weight += change
