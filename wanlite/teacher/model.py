"""A Wan's files -> guided one-frame velocities; memory decides where its experts are kept.

Legend: B batch, C channels, H W latent height and width, N image tokens, D width.
"""

import gc
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from accelerate import init_empty_weights
from diffusers import WanTransformer3DModel
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard

from ..network import (
    OneFrameBlock,
    PatchEmbedding,
    TextTokens,
    compile_blocks,
    one_frame_velocity,
    use_cudnn_self_attention,
)
from ..runtime.devices import capability_of, prefers_cudnn_attention
from ..schedule import TIMESTEPS
from .expert_files import ExpertFiles, TeacherFiles
from .pinned import pin_together

RESIDENCIES = ("both", "one", "streamed", "disk")  # of one process; several may also have it "sharded"
SHARDED_BESIDE = 0.1  # of an expert's bytes: the parts beside the blocks, and two gathered blocks
BYTES_PER_TOKEN = 36  # and channel of the width: the peak of a pass in bfloat16, beside 64 trajectories
# image tokens of a teacher's pass: 32 guided images of 512 x 512; 8 GB of activations at A14B's width
TOKENS_AT_ONCE = 65536


class Teacher:
    """The frozen teacher: the guided velocity at this noise level for these text tokens.

    Experts are read when they are first needed. `residency` decides where they are kept: "both" on the
    device; "one" there and the other in the CPU's memory; "streamed" from the CPU's memory block by block
    while the block before computes; read from "disk" block by block at each pass; or "sharded", each rank of
    a machine with its share of every block: then all ranks have to run the same expert at the same time.
    `is_fp8` keeps the matrices in float8, half the size of bfloat16, and computes in `dtype`.
    `tokens_at_once` is the most image tokens of one pass, those of the negative prompt included. `is_compiled`
    compiles the blocks of experts that stay in memory as they are: "both" and "one", not in float8.
    """

    def __init__(
        self,
        files: TeacherFiles,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        residency: str = "both",
        is_fp8: bool = False,
        tokens_at_once: int = TOKENS_AT_ONCE,
        is_compiled: bool = False,
    ):
        self.files, self.config, self.boundary = files, files.config, files.boundary
        self.device, self.dtype, self.residency, self.is_fp8 = torch.device(device), dtype, residency, is_fp8
        self.tokens_at_once, self.is_compiled = tokens_at_once, is_compiled
        self._read: dict[str, Any] = {}
        self._on_cpu: dict[str, dict[str, Tensor]] = {}
        self.mesh = machine_mesh(self.device) if residency == "sharded" else None

    def expert(self, name: str) -> Any:
        """Return one expert, "high", "low" or "only", ready to run."""
        if name not in self._read:
            if self.residency == "one" and self.device.type == "cpu":
                self.unload()  # the CPU's memory is the device's
            self._read[name] = self._load(self.files.experts[name])
            if self.residency == "one":
                if self.device.type == "cuda":
                    pin_together(self._read[name])
                self._on_cpu[name] = self._read[name].state_dict()
        if self.residency == "one":
            for other in self._read.keys() - {name}:  # out first, then in; the CPU has kept a copy
                self._read[other].load_state_dict(self._on_cpu[other], assign=True)
            self._read[name].to(self.device, non_blocking=True)
        return self._read[name]

    def unload(self) -> None:
        """Free the memory of all experts; they are read again when they are next needed."""
        self._read.clear()
        self._on_cpu.clear()
        gc.collect()  # hooks and their modules refer to each other
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch._C._host_emptyCache()  # pinned memory; it has a public name from torch 2.13 on

    def _load(self, files: ExpertFiles) -> Any:
        if self.residency == "disk":
            return stream_expert(files, self.device, self.dtype)
        if self.residency == "sharded":
            return shard_expert(files, self.device, self.dtype, self.mesh)
        place = self.device if self.residency == "both" else torch.device("cpu")
        load = load_fp8_expert if self.is_fp8 else load_expert
        expert = load(files, place, self.dtype)
        if prefers_cudnn_attention(capability_of(self.device)):
            use_cudnn_self_attention(expert)
        if self.is_compiled and self.residency in ("both", "one") and not self.is_fp8:
            compile_blocks([expert])
        if self.residency == "streamed":
            if self.device.type == "cuda":  # one by one: the hooks would have all of them twice
                for weight in expert.parameters():
                    weight.data = weight.data.pin_memory()
            expert.enable_group_offload(
                onload_device=self.device,
                offload_type="block_level",
                num_blocks_per_group=1,
                use_stream=self.device.type == "cuda",
            )
        return expert

    @torch.no_grad()
    def velocity(
        self,
        latents: Tensor,
        timestep: Tensor,
        text: TextTokens,
        negative: TextTokens | None = None,
        guidance_high: float = 1.0,
        guidance_low: float = 1.0,
        feature_blocks: Sequence[int] = (),
    ) -> tuple[Tensor, list[Tensor]]:
        """Return the guided velocity (B, C, H, W), and hidden states (B, N, D) of the prompt's own pass after
        `feature_blocks`.

        Each row is routed by its own timestep. Guidance runs if it is above 1, as in WanPipeline, and needs
        `negative`, TextTokens of the same rows; a teacher with one expert uses `guidance_high`. Velocities
        are in float32.
        """
        query = _Query(latents, timestep, text, negative, (guidance_high, guidance_low), feature_blocks)
        is_high = timestep >= TIMESTEPS * (self.boundary or 0.0)
        if is_high.all() or not is_high.any():
            return self._velocity_of_one(query, bool(is_high[0]))
        return self._velocity_of_both(query, is_high)

    def _velocity_of_one(self, query: "_Query", is_high: bool) -> tuple[Tensor, list[Tensor]]:
        expert = self.expert("only" if self.boundary is None else "high" if is_high else "low")
        guidance = query.guidance[0 if is_high else 1]
        num_rows, rows = len(query.latents), self._rows_at_once(query.latents, guidance > 1.0)
        chunks = [slice(start, start + rows) for start in range(0, num_rows, rows)]
        num_passes = self._count_passes(len(chunks), is_high)
        if num_passes == 1:
            return _guided_velocity(expert, query, guidance)
        repeated = chunks + chunks[-1:] * (num_passes - len(chunks))
        found = [_guided_velocity(expert, query.rows(chunk), guidance) for chunk in repeated][: len(chunks)]
        velocities, features = zip(*found)
        return torch.cat(velocities), [torch.cat(states) for states in zip(*features)]

    def _rows_at_once(self, latents: Tensor, is_guided: bool) -> int:
        tokens = latents.shape[-2] * latents.shape[-1] // math.prod(self.config["patch_size"])
        return max(1, self.tokens_at_once // (tokens * (2 if is_guided else 1)))

    def _count_passes(self, num_passes: int, is_high: bool) -> int:
        """Return the number of passes for one query: for a sharded teacher, the maximum over all ranks."""
        if self.mesh is None:
            return num_passes
        needed = torch.tensor([num_passes, is_high, -is_high], device=self.device)
        distributed.all_reduce(needed, distributed.ReduceOp.MAX, group=self.mesh.get_group())
        num_passes, any_high, none_low = map(int, needed.tolist())
        if any_high != -none_low:
            raise RuntimeError("the ranks need different experts of a sharded teacher at the same time.")
        return num_passes

    def _velocity_of_both(self, query: "_Query", is_high: Tensor) -> tuple[Tensor, list[Tensor]]:
        velocity = torch.empty_like(query.latents, dtype=torch.float32)
        features: list[Tensor] = []
        for rows, high in ((is_high, True), (~is_high, False)):
            velocity[rows], states = self._velocity_of_one(query.rows(rows), high)
            if not features:
                features = [state.new_empty(len(velocity), *state.shape[1:]) for state in states]
            for whole, state in zip(features, states):
                whole[rows] = state
        return velocity, features


class _Query(NamedTuple):
    """The rows of one call of Teacher.velocity(); `guidance` is the high and the low expert's."""

    latents: Tensor
    timestep: Tensor
    text: TextTokens
    negative: TextTokens | None
    guidance: tuple[float, float]
    feature_blocks: Sequence[int]

    def rows(self, index: slice | Tensor) -> "_Query":
        return self._replace(
            latents=self.latents[index],
            timestep=self.timestep[index],
            text=self.text.rows(index),
            negative=None if self.negative is None else self.negative.rows(index),
        )


def _guided_velocity(expert: "Expert", query: _Query, guidance: float) -> tuple[Tensor, list[Tensor]]:
    if guidance <= 1.0:
        return run_expert(expert, query.latents, query.timestep, query.text, query.feature_blocks)
    if query.negative is None:
        raise TypeError("guidance needs the negative prompt's tokens: negative is None.")
    velocity, features = run_expert(
        expert,
        query.latents.repeat(2, 1, 1, 1),
        query.timestep.repeat(2),
        _stack_text(query.text, query.negative),
        query.feature_blocks,
    )
    wanted, unwanted = velocity.chunk(2)
    return unwanted + guidance * (wanted - unwanted), [states.chunk(2)[0].clone() for states in features]


def choose_residency(
    files: TeacherFiles,
    dtype: torch.dtype,
    is_fp8: bool,
    free_device: int,
    free_host: int,
    is_cpu: bool = False,
    shares: int = 1,
) -> str:
    """Return the first of "both", "one", "sharded", "streamed", "disk" that fits in memory.

    `shares` is the number of processes on this machine: its GPUs reach each other faster than the CPU's
    memory. `free_device` and `free_host` are bytes; the memory of trajectories and their passes stays free.
    On the CPU the two are one memory, and nothing is streamed from it.
    """
    size = max(expert.num_parameters for expert in files.experts.values()) * (1 if is_fp8 else dtype.itemsize)
    whole, activations = size * len(files.experts), TOKENS_AT_ONCE * files.width * BYTES_PER_TOKEN
    if whole + activations <= free_device:
        return "both"
    if size + activations <= free_device and len(files.experts) > 1 and (is_cpu or whole <= free_host):
        return "one"
    share = whole / shares + SHARDED_BESIDE * size + activations
    if shares > 1 and not is_cpu and not is_fp8 and share <= free_device:
        return "sharded"
    pinned = sum(pinned_bytes(expert, dtype, is_fp8) for expert in files.experts.values())
    return "streamed" if pinned <= free_host and not is_cpu else "disk"


def pinned_bytes(files: ExpertFiles, dtype: torch.dtype, is_fp8: bool) -> int:
    """Return the bytes of the CPU's memory for an expert that is streamed: torch pins powers of two."""
    return sum(
        2 ** (torch.Size(shape).numel() * (1 if is_fp8 else dtype.itemsize) - 1).bit_length()
        for *_, shape in files.places.values()
    )


class Expert(WanTransformer3DModel):
    """diffusers' network on single frames; diffusers' hooks for offloading and casting wrap its forward."""

    _repeated_blocks = ["OneFrameBlock"]  # compile_repeated_blocks() finds blocks by the name of their class

    patch_embedding: nn.Conv3d
    blocks: nn.ModuleList

    def forward(
        self,
        latents: Tensor,
        timestep: Tensor,
        text: Tensor,
        logit_bias: Tensor | None = None,
        feature_blocks: Sequence[int] = (),
    ) -> tuple[Tensor, list[Tensor]]:
        """See network.one_frame_velocity()."""
        return one_frame_velocity(self, latents, timestep, text, logit_bias, feature_blocks)


def run_expert(
    expert: Any, latents: Tensor, timestep: Tensor, text: TextTokens, feature_blocks: Sequence[int] = ()
) -> tuple[Tensor, list[Tensor]]:
    """Run one expert in its own dtype; timesteps and the velocity are float32.

    Shapes: latents (B, C, H, W), timestep (B,); returns the velocity (B, C, H, W) and the hidden states (B, N, D)
    after `feature_blocks`.
    """
    dtype = expert.patch_embedding.weight.dtype
    velocity, features = expert(
        latents.to(dtype), timestep.float(), text.tokens.to(dtype), text.logit_bias, feature_blocks
    )
    return velocity.float(), features


def load_expert(
    files: ExpertFiles, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> Any:
    """Load one expert, frozen: a stock WanTransformer3DModel whose blocks take the text's logit bias."""
    with init_empty_weights():  # parameters without memory; the rotary tables are real
        network = make_expert(files, files.config["num_layers"])
    network.load_state_dict(_read_all(files, files.places, device, dtype), strict=True, assign=True)
    return network.to(device).eval().requires_grad_(False)


def load_fp8_expert(files: ExpertFiles, device: str | torch.device, dtype: torch.dtype) -> Any:
    """Load one expert whose matrices are in float8 and computed in `dtype`; each is cast once it is read."""
    with init_empty_weights():
        network = make_expert(files, files.config["num_layers"]).eval().requires_grad_(False)
        network.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=dtype)
    tensors = {}
    for name, weight in network.named_parameters():
        (tensor,) = _read_all(files, [name], device, dtype).values()
        tensors[name] = tensor.to(weight.dtype) if weight.dtype == torch.float8_e4m3fn else tensor
    network.load_state_dict(tensors, strict=True, assign=True)
    return network.to(device)


def stream_expert(
    files: ExpertFiles, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> Any:
    """Load one expert without its blocks; each pass reads them from disk, one in memory at a time."""
    with init_empty_weights():
        network = make_expert(files, 0)
    others = [name for name in files.places if not name.startswith("blocks.")]
    network.load_state_dict(_read_all(files, others, device, dtype), strict=True, assign=True)
    network.blocks = _StreamedBlocks(files, device, dtype)
    return network.to(device).eval().requires_grad_(False)


def _read_all(
    files: ExpertFiles, names: Iterable[str], device: str | torch.device, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Read tensors by name; those of modules that Wan keeps in float32 stay in it."""
    stays = set(WanTransformer3DModel._keep_in_fp32_modules)
    return {
        name: files.read(name, torch.float32 if set(name.split(".")) & stays else dtype, device=device)
        for name in names
    }


def shard_expert(files: ExpertFiles, device: torch.device, dtype: torch.dtype, mesh: DeviceMesh) -> Any:
    """Load one expert whose blocks are shared out equally over `mesh`; a block is gathered while it computes.

    All ranks of the mesh have to run it together. Every rank reads each block, one in memory at a time.
    """
    network = stream_expert(files, device, dtype)
    streamed = network.blocks
    network.blocks = nn.ModuleList(
        fully_shard(streamed.read(index), mesh=mesh) for index in range(len(streamed))
    )
    others = {weight for name, weight in network.named_parameters() if not name.startswith("blocks.")}
    return fully_shard(
        network, mesh=mesh, ignored_params=others
    )  # the root, so that blocks are gathered ahead


def machine_mesh(device: torch.device) -> DeviceMesh:
    """Return the mesh of this machine's ranks."""
    local = int(os.environ["LOCAL_WORLD_SIZE"])
    shape = (distributed.get_world_size() // local, local)
    return init_device_mesh(device.type, shape, mesh_dim_names=("machines", "ranks"))["ranks"]


class _StreamedBlocks(nn.Module):
    """The blocks of an expert, each read from disk when it is reached."""

    def __init__(self, files: ExpertFiles, device: str | torch.device, dtype: torch.dtype):
        super().__init__()
        self.files, self.device, self.dtype = files, device, dtype

    def __len__(self) -> int:
        return self.files.config["num_layers"]

    def __iter__(self) -> Iterator[nn.Module]:
        for index in range(len(self)):
            block = self.read(index)
            yield block
            block.to("meta")  # freed before the next is read, even if it is still referenced

    def read(self, index: int) -> nn.Module:
        """Return one block, which the caller may keep."""
        with init_empty_weights():
            block = _empty_block(self.files)
        prefix = f"blocks.{index}."
        names = [name for name in self.files.places if name.startswith(prefix)]
        tensors = _read_all(self.files, names, self.device, self.dtype)
        block.load_state_dict(
            {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}, strict=True, assign=True
        )
        return block.eval().requires_grad_(False)


def make_expert(files: ExpertFiles, depth: int) -> Any:
    """Return an expert of `files`' sizes and of `depth` blocks, in the default dtype, without reading weights."""
    config = files.config
    network = Expert(**config | {"num_layers": 0})
    patch_size = config["patch_size"]
    network.patch_embedding = PatchEmbedding(config["in_channels"], files.width, patch_size, patch_size)
    network.blocks = nn.ModuleList(_empty_block(files) for _ in range(depth))
    return network


def _empty_block(files: ExpertFiles) -> OneFrameBlock:
    config = files.config
    return OneFrameBlock(
        files.width,
        config["ffn_dim"],
        config["num_attention_heads"],
        config["qk_norm"],
        config["cross_attn_norm"],
        config["eps"],
    )


def _stack_text(first: TextTokens, second: TextTokens) -> TextTokens:
    """Put two sets of prompts into one batch, padded to one length."""
    length = max(first.tokens.shape[1], second.tokens.shape[1])
    padded = [
        TextTokens(
            nn.functional.pad(text.tokens, (0, 0, 0, length - text.tokens.shape[1])),
            nn.functional.pad(text.logit_bias, (0, length - text.logit_bias.shape[1]), value=-torch.inf),
        )
        for text in (first, second)
    ]
    return TextTokens(*(torch.cat(chunks) for chunks in zip(*padded)))
