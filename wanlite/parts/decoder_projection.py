"""The decoder of Wan's autoencoder -> a narrower one of the same class that starts from its weights.

The most important channels of each layer are kept. In the order of the data, each convolution of the narrow decoder is
then refitted by ridge regression, from the narrow decoder's own activations to the wide one's.

Legend: B images, C c channels of the wide and of the narrow decoder, H W height and width of a layer. Activations
are those of single frames, (B, C, 1, H, W).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanUpBlock
from torch import Tensor, nn
from torch.nn import functional as F

from ..data.autoencoder import raw_latents, use_single_frame_path
from ..student.regression import solve_ridge

BASE_DIM = 96  # of an AutoencoderKLWan whose config does not name it
RIDGE = 1e-4  # relative to the mean diagonal of the Gram matrix
MAX_ROWS = 16384  # places of a layer from which it is refitted


class Pair(NamedTuple):
    """Activations of the same layer in both decoders; the narrow one stands for the channels `kept` (c,)."""

    wide: Tensor
    narrow: Tensor
    kept: Tensor


@torch.no_grad()
def project_decoder(autoencoder: Any, base_dim: int, latents: Tensor) -> Any:
    """Return an AutoencoderKLWan with the encoder of `autoencoder` and a decoder of `base_dim` channels.

    `latents` (B, C, H, W), normalised, are those of a few images. Temporal taps, which a single frame does not use,
    are zero. Raises ValueError if `base_dim` is wider than the decoder, or not a number of channels that it can have.
    """
    narrow = empty_decoder(autoencoder, base_dim)
    wide = use_single_frame_path(autoencoder)
    states = wide.post_quant_conv(raw_latents(wide, latents).unsqueeze(2))
    kept = choose_channels(wide.decoder, narrow.decoder, states)
    pair = Pair(states, states, torch.arange(states.shape[1]))
    for layer in _layers(wide.decoder, narrow.decoder):
        pair = layer(pair, kept)
    return narrow


@torch.no_grad()
def empty_decoder(autoencoder: Any, base_dim: int) -> Any:
    """Return an autoencoder with a decoder of `base_dim` channels whose weights are zero; all others are copies."""
    check_width(autoencoder.config, base_dim)
    # The private entries would reset values that were defaults.
    config = {name: value for name, value in autoencoder.config.items() if not name.startswith("_")}
    narrow = AutoencoderKLWan.from_config(config | {"decoder_base_dim": base_dim})
    for name in ("encoder", "quant_conv", "post_quant_conv"):
        getattr(narrow, name).load_state_dict(getattr(autoencoder, name).state_dict())
    for weight in narrow.decoder.parameters():
        weight.zero_()
    return use_single_frame_path(narrow).to(autoencoder.device)


def widest(config: Any) -> int:
    """Return the channels of the last layers of the decoder of a config."""
    return config.get("decoder_base_dim") or config.get("base_dim") or BASE_DIM


def has_width(config: Any, base_dim: int) -> bool:
    """Whether a decoder of this config can be narrowed to `base_dim` channels; most kinds halve them."""
    is_whole = config.get("is_residual") or base_dim % 2 == 0
    return 1 <= base_dim <= widest(config) and is_whole


def check_width(config: Any, base_dim: int) -> None:
    """Raise ValueError unless a decoder of this config can be narrowed to `base_dim` channels."""
    if not has_width(config, base_dim):
        is_residual = config.get("is_residual")
        kind, smallest = ("a number", 1) if is_residual else ("an even number", 2)
        raise ValueError(
            f"a decoder of {base_dim} channels cannot be made of one of {widest(config)}, expected {kind} from "
            f"{smallest} to {widest(config)}."
        )


# ---- channels ----------------------------------------------------------------------------------------------


@dataclass
class Stream:
    """Consecutive layers whose channels are the same ones, because each adds to the one before."""

    readers: list[Any] = field(default_factory=list)  # the norms that read it
    source: int | None = None  # number of the stream whose channels are repeated into this one
    repeat: Any = None  # the DupUp3D that does so

    @property
    def width(self) -> int:
        return self.readers[0].gamma.numel()


def find_streams(decoder: Any) -> list[Stream]:
    """Return the streams of a decoder, in the order of the data."""
    streams = [Stream()]

    def add(block):
        streams[-1].readers.append(block.norm1)
        if not isinstance(block.conv_shortcut, nn.Identity):
            streams.append(Stream())

    first, *others = decoder.mid_block.resnets
    add(first)
    for attention, block in zip(decoder.mid_block.attentions, others, strict=True):
        streams[-1].readers.append(attention.norm)
        add(block)
    for up_block in decoder.up_blocks:
        source = len(streams) - 1
        for block in up_block.resnets:
            add(block)
        if upsampler_of(up_block) is not None:
            repeat = getattr(up_block, "avg_shortcut", None)
            streams.append(Stream(source=source if repeat else None, repeat=repeat))
    streams[-1].readers.append(decoder.norm_out)
    return streams


def choose_channels(wide: Any, narrow: Any, states: Tensor) -> Iterator[Tensor]:
    """Yield the channels (c,) that are kept of each stream: those of most energy in the norms that read them."""
    streams = find_streams(wide)
    widths = [stream.width for stream in find_streams(narrow)]
    energies = measure_energy(wide, streams, states)
    kept: dict[int, Tensor] = {}
    for number in reversed(range(len(streams))):
        stream = streams[number]
        if number not in kept:
            energy = energies[number]
            if stream.source is not None:  # a channel is kept with those that are repeated into it
                energy = energy + energies[stream.source][sources_of(stream.repeat)].mean(1)
            kept[number] = energy.topk(widths[number]).indices.sort().values.cpu()
        if stream.source is not None:
            kept[stream.source] = sources_of(stream.repeat)[kept[number]].flatten().unique()
    return iter([kept[number] for number in range(len(streams))])


def sources_of(repeat: Any) -> Tensor:
    """Return the channels (C, n) that a DupUp3D repeats into each of its output channels."""
    outputs = torch.arange(repeat.out_channels * repeat.factor).view(repeat.out_channels, -1)
    return (outputs // repeat.repeats)[:, :: max(1, min(repeat.repeats, repeat.factor))]


def measure_energy(decoder: Any, streams: Sequence[Stream], states: Tensor) -> list[Tensor]:
    """Return the mean square (C,) of each stream's channels after the norms that read them."""
    energies: dict[Any, Tensor] = {}

    def store(norm, inputs, output):
        channels = output.transpose(0, 1).flatten(1)  # (C, places)
        energies[norm] = channels.square().mean(1)

    norms = [norm for stream in streams for norm in stream.readers]
    hooks = [norm.register_forward_hook(store) for norm in norms]
    decoder(states, first_chunk=True)
    for hook in hooks:
        hook.remove()
    return [torch.stack([energies[norm] for norm in stream.readers]).mean(0) for stream in streams]


# ---- layers ------------------------------------------------------------------------------------------------


def _layers(wide, narrow):
    """Yield a function (pair, kept) -> pair for each layer of both decoders, in the order of the data."""
    yield lambda pair, kept: fit_convolution(wide.conv_in, narrow.conv_in, pair, next(kept))
    blocks = zip(wide.mid_block.resnets, narrow.mid_block.resnets)
    attentions = zip(wide.mid_block.attentions, narrow.mid_block.attentions)
    yield _fit_block(*next(blocks))
    for attention, block in zip(attentions, blocks, strict=True):
        yield _fit_attention(*attention)
        yield _fit_block(*block)
    for both in zip(wide.up_blocks, narrow.up_blocks):
        yield _fit_up_block(*both)
    yield lambda pair, kept: fit_head(wide, narrow, pair)


def _fit_block(wide, narrow):
    return lambda pair, kept: fit_block(wide, narrow, pair, kept)


def _fit_attention(wide, narrow):
    return lambda pair, kept: fit_attention(wide, narrow, pair)


def _fit_up_block(wide, narrow):
    return lambda pair, kept: fit_up_block(wide, narrow, pair, kept)


def fit_convolution(wide: Any, narrow: Any, pair: Pair, kept: Tensor) -> Pair:
    """Fit a convolution whose output channels `kept` remain."""
    output = wide(pair.wide)
    take_weights(wide, narrow, pair.kept, kept)
    refit(narrow, pair.narrow, output[:, kept])
    return Pair(output, narrow(pair.narrow), kept)


def fit_norm(wide: Any, narrow: Any, pair: Pair) -> Tensor:
    """Fit a norm, which divides by the size of fewer channels; returns its output in the narrow decoder."""
    size, own_size = (states.square().mean(1).sqrt() for states in (pair.wide, pair.narrow))
    ratio = own_size.mean() / size.mean().clamp(min=1e-12)
    narrow.gamma.copy_(wide.gamma[pair.kept] * ratio)
    return narrow(pair.narrow)


def fit_block(wide: Any, narrow: Any, pair: Pair, kept: Iterator[Tensor]) -> Pair:
    """Fit a residual block; its inner channels are chosen by what the second convolution makes of them."""
    shortcut = pair
    if not isinstance(wide.conv_shortcut, nn.Identity):
        shortcut = fit_convolution(wide.conv_shortcut, narrow.conv_shortcut, pair, next(kept))
    inner = wide.conv1(F.silu(wide.norm1(pair.wide)))
    inner_kept = choose_inner(wide, inner, narrow.norm2.gamma.numel())
    states = F.silu(fit_norm(wide.norm1, narrow.norm1, pair))
    take_weights(wide.conv1, narrow.conv1, pair.kept, inner_kept)
    refit(narrow.conv1, states, inner[:, inner_kept])
    inner_pair = Pair(inner, narrow.conv1(states), inner_kept)
    states = F.silu(fit_norm(wide.norm2, narrow.norm2, inner_pair))
    take_weights(wide.conv2, narrow.conv2, inner_kept, shortcut.kept)
    output = wide(pair.wide)
    refit(narrow.conv2, states, output[:, shortcut.kept] - shortcut.narrow)
    return Pair(output, narrow(pair.narrow), shortcut.kept)


def choose_inner(block: Any, inner: Tensor, count: int) -> Tensor:
    """Return the `count` inner channels of most energy in the block's output."""
    energy = F.silu(block.norm2(inner)).square().mean((0, 2, 3, 4))
    energy *= weights_of(block.conv2).square().sum((0, 2, 3))
    return energy.topk(count).indices.sort().values.cpu()


def fit_attention(wide: Any, narrow: Any, pair: Pair) -> Pair:
    """Fit the attention of one head: its logits and values are those of the kept channels, exactly.

    The products of queries and keys, and of values and the output, become one matrix each. Terms of the logits that
    are the same for all keys have no effect.
    """
    kept = pair.kept
    weight, bias = wide.to_qkv.weight.flatten(1), wide.to_qkv.bias
    (query, key, value), (query_bias, _, value_bias) = weight.chunk(3), bias.chunk(3)
    width = len(kept)
    scale = (width / weight.shape[1]) ** 0.5  # attention divides by the root of the width
    identity = torch.eye(width, device=weight.device)
    products = scale * key[:, kept].T @ query[:, kept]
    biases = [scale * key[:, kept].T @ query_bias, bias.new_zeros(2 * width)]
    narrow.to_qkv.weight.copy_(torch.cat([products, identity, identity])[..., None, None])
    narrow.to_qkv.bias.copy_(torch.cat(biases))
    output = wide.proj.weight.flatten(1)[kept]
    narrow.proj.weight.copy_((output @ value[:, kept])[..., None, None])
    narrow.proj.bias.copy_(output @ value_bias + wide.proj.bias[kept])
    fit_norm(wide.norm, narrow.norm, pair)
    target = wide(pair.wide)
    refit(narrow.proj, input_of(narrow.proj, narrow, pair.narrow), target[:, kept] - pair.narrow)
    return Pair(target, narrow(pair.narrow), kept)


def fit_up_block(wide: Any, narrow: Any, pair: Pair, kept: Iterator[Tensor]) -> Pair:
    """Fit a block with its upsampler, if it has one, and with the shortcut around both."""
    first = pair
    for blocks in zip(wide.resnets, narrow.resnets):
        pair = fit_block(*blocks, pair, kept)
    if upsampler_of(wide) is None:
        return pair
    convolution, own_convolution = (upsampler_of(block).resample[1] for block in (wide, narrow))
    chosen = next(kept)
    output = wide(first.wide) if isinstance(wide, WanUpBlock) else wide(first.wide, first_chunk=True)
    repeated = upsampler_of(narrow).resample[0](pair.narrow.squeeze(2)).unsqueeze(2)
    target = output[:, chosen]
    if getattr(narrow, "avg_shortcut", None) is not None:
        target = target - narrow.avg_shortcut(first.narrow, first_chunk=True)
    take_weights(convolution, own_convolution, pair.kept, chosen)
    refit(own_convolution, repeated, target)
    own = narrow(first.narrow) if isinstance(wide, WanUpBlock) else narrow(first.narrow, first_chunk=True)
    return Pair(output, own, chosen)


def upsampler_of(up_block: Any) -> Any:
    """Return the WanResample of a block, or None."""
    upsamplers = getattr(up_block, "upsamplers", None)
    return upsamplers[0] if upsamplers else getattr(up_block, "upsampler", None)


def fit_head(wide: Any, narrow: Any, pair: Pair) -> Pair:
    """Fit the last norm and convolution."""
    pixels = wide.conv_out(F.silu(wide.norm_out(pair.wide)))
    states = F.silu(fit_norm(wide.norm_out, narrow.norm_out, pair))
    every = torch.arange(pixels.shape[1])
    take_weights(wide.conv_out, narrow.conv_out, pair.kept, every)
    refit(narrow.conv_out, states, pixels)
    return Pair(pixels, narrow.conv_out(states), every)


# ---- convolutions ------------------------------------------------------------------------------------------


def weights_of(convolution: Any) -> Tensor:
    """Return the weights (out, in, height, width) that a single frame meets."""
    weight = convolution.weight
    return weight[:, :, -1] if weight.ndim == 5 else weight


def take_weights(wide: Any, narrow: Any, inputs: Tensor, outputs: Tensor) -> None:
    """Copy the weights between the kept inputs and outputs of a convolution."""
    weights_of(narrow).copy_(weights_of(wide)[outputs][:, inputs])
    narrow.bias.copy_(wide.bias[outputs])


def refit(convolution: Any, inputs: Tensor, target: Tensor) -> None:
    """Refit a convolution in place by ridge regression from `inputs` (B, in, 1, H, W) to `target` (B, out, 1, H, W)."""
    weight = weights_of(convolution)
    padding = weight.shape[-1] // 2
    inputs, target = inputs.squeeze(2), target.squeeze(2)
    residual = target - F.conv2d(inputs, weight, convolution.bias, padding=padding)
    if residual.square().mean() <= 1e-10 * target.square().mean():
        return
    places = sample_places(residual.numel() // residual.shape[1]).to(inputs.device)
    windows = windows_at(F.pad(inputs, [padding] * 4), weight.shape[-1], places)
    change, bias_change = solve_ridge(windows, residual.permute(0, 2, 3, 1).flatten(0, 2)[places], RIDGE)
    weight += change.view_as(weight)
    convolution.bias += bias_change


def sample_places(count: int) -> Tensor:
    """Return at most MAX_ROWS of `count` places, the same ones each time."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(0))[:MAX_ROWS]


def windows_at(padded: Tensor, size: int, places: Tensor) -> Tensor:
    """Return the windows (rows, C * size * size) of padded activations at numbered `places`."""
    windows = padded.unfold(2, size, 1).unfold(3, size, 1)  # (B, C, H, W, size, size), without a copy
    height, width = windows.shape[2:4]
    image, row, column = places // (height * width), places // width % height, places % width
    return windows[image, :, row, column].flatten(1)


def input_of(layer: Any, network: Any, states: Tensor) -> Tensor:
    """Return the input (B, C, 1, H, W) of a 2-D `layer` when `network` is applied to `states`."""
    found: list[Tensor] = []
    hook = layer.register_forward_pre_hook(lambda module, inputs: found.append(inputs[0]))
    network(states)
    hook.remove()
    return found[0].unsqueeze(2)
