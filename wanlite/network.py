"""A Wan transformer at one frame: latents and text tokens in, velocity out.

Teacher and student are both built from diffusers' own Wan modules under diffusers' key names. Two additions
leave the function unchanged: latents may be 4-D, and the zero padding of the text, which Wan attends to, costs
one token.

Legend: B batch, C channels, H W latent height and width, N image tokens, L text length, D width, T text
width.
"""

import math
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry
from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn
from diffusers.models.transformers.transformer_wan import (
    WanAttnProcessor,
    WanTransformerBlock,
    _get_qkv_projections,
)
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import has_torch_function

TEXT_LENGTH = (
    512  # every Wan was trained on text padded with zeros to this length, and attends to the padding
)
CUDNN = AttentionBackendName._NATIVE_CUDNN
# Lengths of text on a device are multiples of this: attention there pads masks itself, and compiled code has few sizes.
TEXT_MULTIPLES = {"cuda": 16}


class TextTokens(NamedTuple):
    """Prompts at their true length, each with one zero token in place of all of its padding.

    `tokens` (B, L, T); `logit_bias` (B, L) is added to the attention logits of every text token: 0 for a
    word, log(number of padding tokens) for the zero token, -inf for tokens that only fill up the batch.
    """

    tokens: Tensor
    logit_bias: Tensor

    def to(self, *args: Any, **kwargs: Any) -> "TextTokens":
        tokens = self.tokens.to(*args, **kwargs)
        return TextTokens(tokens, self.logit_bias.to(tokens.device))

    def rows(self, index: Any) -> "TextTokens":
        """Return the prompts at `index` (a slice, a list or a tensor of row numbers)."""
        return TextTokens(self.tokens[index], self.logit_bias[index])


def pack_text(embeddings: Sequence[Tensor], text_length: int = TEXT_LENGTH) -> TextTokens:
    """Turn prompt embeddings, a list of (length, T), into TextTokens that equal zero padding to `text_length`."""
    lengths = torch.tensor([len(embedding) for embedding in embeddings])
    return pack_states(nn.utils.rnn.pad_sequence(list(embeddings), batch_first=True), lengths, text_length)


def pack_states(states: Tensor, lengths: Tensor, text_length: int = TEXT_LENGTH) -> TextTokens:
    """Turn a text encoder's hidden states (B, L, T) with `lengths` (B,) in words into TextTokens.

    They are in float32 whatever the encoder's dtype: the networks cast them, or train in float32.
    """
    length = lengths.to(states.device).unsqueeze(1)
    position = torch.arange(states.shape[1] + 1, device=states.device)
    tokens = functional.pad(states.float(), (0, 0, 0, 1)).masked_fill((position >= length).unsqueeze(2), 0.0)
    padding = (text_length - length).clamp(min=0).double().log().float()  # (B, 1)
    return TextTokens(
        tokens, torch.where(position < length, 0.0, torch.where(position == length, padding, -math.inf))
    )


def unpack_text(text: TextTokens, text_length: int = TEXT_LENGTH) -> Tensor:
    """Return the padded form (B, text_length, T) that a stock WanTransformer3DModel takes."""
    padded = text.tokens.new_zeros(len(text.tokens), text_length, text.tokens.shape[-1])
    for row, bias in enumerate(text.logit_bias):
        length = int((bias == 0).sum())  # a bias of log(1) = 0 marks a zero token: copying it changes nothing
        padded[row, :length] = text.tokens[row, :length]
    return padded


class FewPassesRMSNorm(torch.autograd.Function):
    """rms_norm() in half of the passes over memory, for the CPU, where torch composes it of elementwise operations."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor, eps: float) -> Tensor:
        power = torch.linalg.vector_norm(states, dim=-1, keepdim=True).square_().div_(states.shape[-1])
        scale = power.add_(eps).rsqrt_()
        normed = states * scale
        ctx.save_for_backward(normed, weight, scale)
        return normed * weight

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        normed, weight, scale = ctx.saved_tensors
        products = (gradient * normed).flatten(0, -2)
        share = torch.mv(products, weight).view(scale.shape).div_(len(weight))
        of_states = torch.addcmul(gradient * weight, normed, share, value=-1).mul_(scale)
        return of_states, products.sum(0), None


class RMSNorm(nn.RMSNorm):
    """RMSNorm in the dtype of its input, also under autocast.

    From torch 2.12 on, autocast on CUDA computes norms in float32, and so does a float32 weight everywhere:
    queries, keys and the attention after them would follow.
    """

    def forward(self, states: Tensor) -> Tensor:
        device = states.device.type
        if device == "cpu" and self._is_trained(states):
            return FewPassesRMSNorm.apply(states, self.weight, self.eps)
        is_cast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
        with torch.autocast(device, enabled=False) if is_cast else nullcontext():
            return functional.rms_norm(states, self.normalized_shape, self.weight.to(states.dtype), self.eps)

    def _is_trained(self, states):
        """Whether gradients are computed, in float32; drawing is that of a stock Wan, bit for bit.

        Neither a compiler nor a mode that replaces torch's functions looks into an autograd function.
        """
        is_single = states.dtype == self.weight.dtype == torch.float32
        has_gradient = torch.is_grad_enabled() and (states.requires_grad or self.weight.requires_grad)
        is_plain = not (torch.compiler.is_compiling() or has_torch_function((states,)))
        return is_single and has_gradient and is_plain


class PatchEmbedding(nn.Conv3d):
    """The convolution that embeds patches, on GPUs as a matrix product: patches do not overlap.

    Many GPUs have no fast 3-D convolution in bfloat16. On the CPU, the result is that of a stock Wan, bit for bit.
    """

    def forward(self, latents: Tensor) -> Tensor:
        """Embed latents (B, C, 1, H, W); returns (B, D, 1, H/p, W/p)."""
        return super().forward(latents) if latents.device.type == "cpu" else self.multiply(latents)

    def multiply(self, latents: Tensor) -> Tensor:
        """Embed latents by a matrix product; the channels of a token lie side by side."""
        _, height, width = self.kernel_size
        patches = latents.squeeze(2).unflatten(-2, (-1, height)).unflatten(-1, (-1, width))
        patches = patches.permute(0, 2, 4, 1, 3, 5).flatten(3)  # (B, H/p, W/p, C*p*p)
        tokens = functional.linear(patches, self.weight.flatten(1), self.bias)
        return tokens.permute(0, 3, 1, 2).unsqueeze(2)


def rotate(states: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Turn the channel pairs of queries or keys (B, N, heads, channels) by the angles of their positions.

    `rotary` are the cosines and sines (1, N, 1, channels) of a WanRotaryPosEmbed. Products are in float32, and the
    result has the dtype of `states`. The complex form is a single pass over memory. Compiled code takes the real
    form: inductor fuses it, and has no code for complex numbers.
    """
    pairs = states.to(torch.promote_types(states.dtype, torch.float32)).unflatten(-1, (-1, 2))
    # Both channels of a pair have the same angle.
    cos, sin = (table.to(pairs.dtype).unflatten(-1, (-1, 2)).select(-1, 0) for table in rotary)
    if torch.compiler.is_compiling():
        x, y = pairs.unbind(-1)
        turned = torch.stack([x * cos - y * sin, x * sin + y * cos], -1)
    else:
        turned = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * torch.complex(cos, sin))
    return turned.flatten(-2).to(states.dtype)


class OneFrameAttnProcessor(WanAttnProcessor):
    """diffusers' processor without image tokens, with the rotary embedding of rotate().

    With `has_cudnn`, cuDNN computes attention in half precision, unless another backend is set.
    """

    has_cudnn = False

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        query, key, value = _get_qkv_projections(attn, hidden_states, encoder_hidden_states)
        query, key = attn.norm_q(query), attn.norm_k(key)
        query, key, value = (states.unflatten(2, (attn.heads, -1)) for states in (query, key, value))
        if rotary_emb is not None:
            query, key = rotate(query, rotary_emb), rotate(key, rotary_emb)
        is_half = query.dtype in (torch.float16, torch.bfloat16)
        update = dispatch_attention_fn(
            query,
            key,
            value,
            attn_mask=attention_mask,
            backend=self._attention_backend or (CUDNN if self.has_cudnn and is_half else None),
            parallel_config=self._parallel_config if encoder_hidden_states is None else None,
        )
        update = attn.to_out[0](update.flatten(2, 3).type_as(query))
        return attn.to_out[1](update)


class OneFrameBlock(WanTransformerBlock):
    """diffusers' Wan block whose cross-attention also takes a bias on the logits of the text tokens."""

    def __init__(
        self, width: int, ffn_dim: int, num_heads: int, qk_norm: str, cross_attn_norm: bool, eps: float
    ):
        super().__init__(width, ffn_dim, num_heads, qk_norm, cross_attn_norm, eps)
        for attention in (self.attn1, self.attn2):
            attention.norm_q, attention.norm_k = RMSNorm(width, eps), RMSNorm(width, eps)
            attention.set_processor(OneFrameAttnProcessor())

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        rotary_emb: Any,
        text_logit_bias: Tensor | None = None,
    ) -> Tensor:
        """Run the block on hidden_states (B, N, D), with encoder_hidden_states (B, L, D) and temb (B, 6, D)."""
        modulation = (self.scale_shift_table + temb.float()).chunk(6, dim=1)
        shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = modulation
        dtype = hidden_states.dtype

        normed = (self.norm1(hidden_states.float()) * (1 + scale) + shift).to(dtype)
        update = self.attn1(normed, None, None, rotary_emb)
        hidden_states = (hidden_states.float() + update * gate).to(dtype)

        normed = self.norm2(hidden_states.float()).to(dtype)
        mask = None if text_logit_bias is None else text_logit_bias[:, None, None].to(dtype)  # (B, 1, 1, L)
        hidden_states = hidden_states + self.attn2(normed, encoder_hidden_states, mask, None)

        normed = (self.norm3(hidden_states.float()) * (1 + ffn_scale) + ffn_shift).to(dtype)
        return (hidden_states.float() + self.ffn(normed).float() * ffn_gate).to(dtype)


# For diffusers' caches (enable_cache): a block returns the hidden states alone.
TransformerBlockRegistry.register(
    OneFrameBlock,
    TransformerBlockMetadata(
        return_hidden_states_index=0,
        return_encoder_hidden_states_index=None,  # type: ignore[arg-type]
    ),
)


def compile_blocks(networks: Sequence[Any]) -> None:
    """Compile networks block by block, in place; names and weights do not change."""
    torch._dynamo.config.optimize_ddp = False  # it would split blocks at the gradient buckets
    torch._dynamo.config.recompile_limit = 32  # image sizes, text lengths, with and without gradients
    for network in networks:
        network.compile_repeated_blocks()


def use_cudnn_self_attention(network: Any, is_used: bool = True) -> None:
    """Let cuDNN compute the self-attention of all blocks in half precision, or no longer.

    Cross-attention has a mask and a length that varies, and cuDNN would plan anew for each.
    """
    for block in network.blocks:
        block.attn1.processor.has_cudnn = is_used


def pad_length(text: Tensor, logit_bias: Tensor, multiple: int) -> tuple[Tensor, Tensor]:
    """Fill up text tokens (B, L, T) and their logit_bias (B, L) to a multiple, with tokens of no weight."""
    missing = -text.shape[1] % multiple
    if not missing:
        return text, logit_bias
    padded = functional.pad(text, (0, 0, 0, missing))
    return padded, functional.pad(logit_bias, (0, missing), value=-math.inf)


def one_frame_velocity(
    network: Any,
    latents: Tensor,
    timestep: Tensor,
    text: Tensor,
    logit_bias: Tensor | None = None,
    feature_blocks: Sequence[int] = (),
) -> tuple[Tensor, list[Tensor]]:
    """Run a network with the modules of a WanTransformer3DModel and OneFrameBlocks on single frames.

    Shapes: latents (B, C, H, W), timestep (B,) in 0..1000, text (B, L, T), logit_bias (B, L) or None. Returns
    the velocity (B, C, H, W) and a list of the hidden states (B, N, D) after each block in `feature_blocks`.
    """
    if logit_bias is not None:
        text, logit_bias = pad_length(text, logit_bias, TEXT_MULTIPLES.get(text.device.type, 1))
    rotary = network.rope(latents.unsqueeze(2))
    states = network.patch_embedding(latents.unsqueeze(2))  # (B, D, 1, H/p, W/p)
    height, width = states.shape[-2:]
    states = states.flatten(2).transpose(1, 2).contiguous()  # (B, N, D)
    time, time_modulation, text, _ = network.condition_embedder(timestep, text)
    time_modulation = time_modulation.unflatten(1, (6, -1))  # (B, 6, D)

    features = []
    for index, block in enumerate(network.blocks):
        if torch.is_grad_enabled() and network.gradient_checkpointing:
            states = network._gradient_checkpointing_func(
                block, states, text, time_modulation, rotary, logit_bias
            )
        else:
            states = block(states, text, time_modulation, rotary, logit_bias)
        if index in feature_blocks:
            features.append(states)

    shift, scale = (network.scale_shift_table.to(time.device) + time.unsqueeze(1)).chunk(2, dim=1)
    states = (network.norm_out(states.float()) * (1 + scale) + shift).type_as(states)
    return unpatchify(network.proj_out(states), height, width, network.config.patch_size), features


def unpatchify(tokens: Tensor, height: int, width: int, patch_size: Sequence[int]) -> Tensor:
    """Turn tokens (B, N, ph*pw*C), patches in row order with channels last, into latents (B, C, H, W)."""
    _, patch_height, patch_width = patch_size
    patches = tokens.unflatten(1, (height, width)).unflatten(-1, (patch_height, patch_width, -1))
    return patches.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)


def pass_operations(config: Any, rows: int, tokens: int, words: int) -> int:
    """Return the operations of a pass of a Wan on `rows` images of `tokens` tokens, each with `words` text tokens.

    All matrix products count, those of attention included: two operations for each multiplication.
    """
    width = config["num_attention_heads"] * config["attention_head_dim"]
    patch = math.prod(config["patch_size"])
    linear = 2 * tokens * width * (6 * width + 2 * config["ffn_dim"]) + 4 * words * width**2
    attention = 4 * tokens * (tokens + words) * width
    block = linear + attention
    text = 2 * words * width * (config["text_dim"] + width)
    time = 2 * width * (config["freq_dim"] + 7 * width)
    ends = 2 * tokens * width * patch * (config["in_channels"] + config["out_channels"])
    return rows * (config["num_layers"] * block + text + time + ends)
