"""A Wan's files -> guided one-frame velocities, its experts where memory allows.

Legend: B batch, C channels, H W latent height and width, N image tokens, D width.
"""

import gc
import math
import os

import torch
from accelerate import init_empty_weights
from diffusers import WanTransformer3DModel
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from ..network import OneFrameBlock, TextTokens, one_frame_velocity

RESIDENCIES = ("both", "one", "streamed", "disk")  # of one process; several also share it out: "sharded"
SHARDED_BESIDE = 0.1  # of an expert: what is no block, and two blocks that are whole
BYTES_A_TOKEN = (
    36  # of a pass in bfloat16 at its peak, for each channel of the width, and of 64 trajectories beside it
)
# image tokens of a teacher's pass: 32 guided pictures of 512 x 512; 8 GB of activations at A14B's width
TOKENS_AT_ONCE = 65536


class Teacher:
    """The frozen teacher: the guided velocity at this noise level for these text tokens.

    Experts are read when they are first asked, and kept as `residency` says: "both" on the device, "one"
    there and the other in the CPU's memory, "streamed" from the CPU's memory block by block while the block
    before computes, read from "disk" block by block at each pass, or "sharded", each rank of a machine with
    its share of every block: then all of them have to ask the same expert at the same time. `is_fp8` keeps
    their matrices in float8, half of bfloat16, and computes in `dtype`. `tokens_at_once` image tokens go
    through an expert together, those of the negative prompt counted in.
    """

    def __init__(
        self,
        files,
        device="cpu",
        dtype=torch.float32,
        residency="both",
        is_fp8=False,
        tokens_at_once=TOKENS_AT_ONCE,
    ):
        self.files, self.config, self.boundary = files, files.config, files.boundary
        self.device, self.dtype, self.residency, self.is_fp8 = torch.device(device), dtype, residency, is_fp8
        self.tokens_at_once, self._read, self._on_cpu = tokens_at_once, {}, {}
        self.mesh = machine_mesh(self.device) if residency == "sharded" else None

    def expert(self, name):
        """Return one expert, "high", "low" or "only", where it can be asked."""
        if name not in self._read:
            if self.residency == "one" and self.device.type == "cpu":
                self.rest()  # the CPU's memory is the device's
            self._read[name] = self._load(self.files.experts[name])
            self._on_cpu |= {name: self._read[name].state_dict()} if self.residency == "one" else {}
        if self.residency == "one":
            for other in self._read.keys() - {name}:  # out first, then in; the CPU has kept what goes out
                self._read[other].load_state_dict(self._on_cpu[other], assign=True)
            self._read[name].to(self.device)
        return self._read[name]

    def rest(self):
        """Let go of every expert's memory; they are read again when they are next asked."""
        self._read.clear()
        self._on_cpu.clear()
        gc.collect()  # hooks and what they are on hold each other
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch._C._host_emptyCache()  # what was pinned; it has a public name from torch 2.13 on

    def _load(self, files):
        if self.residency == "disk":
            return stream_expert(files, self.device, self.dtype)
        if self.residency == "sharded":
            return shard_expert(files, self.device, self.dtype, self.mesh)
        place = self.device if self.residency == "both" else torch.device("cpu")
        expert = load_expert(files, "cpu" if self.is_fp8 else place, self.dtype)
        if self.is_fp8:  # before it is on a device that has no room for what it was
            expert.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=self.dtype)
            expert.to(place)
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
        self, latents, timestep, text, negative=None, guidance_high=1.0, guidance_low=1.0, feature_blocks=()
    ):
        """Return the guided velocity (B, C, H, W), and token states (B, N, D) of the prompt's own pass after
        `feature_blocks`.

        Each row is routed by its own timestep. Guidance runs where it is above 1, as in WanPipeline, and
        needs `negative`, TextTokens of the same rows; a teacher with one expert uses `guidance_high`.
        Velocities come back in float32.
        """
        is_high = timestep >= 1000 * (self.boundary or 0.0)
        if not (is_high.all() or not is_high.any()):
            return self._velocity_of_both(
                is_high, latents, timestep, text, negative, guidance_high, guidance_low, feature_blocks
            )
        high = bool(is_high[0])
        expert = self.expert("only" if self.boundary is None else "high" if high else "low")
        guidance = guidance_high if high else guidance_low
        rows = self._rows_at_once(latents, guidance > 1.0)
        chunks = [slice(start, start + rows) for start in range(0, len(latents), rows)]
        if (passes := self._most_passes(len(chunks), high)) > 1:
            chunks = [
                self.velocity(
                    latents[chunk],
                    timestep[chunk],
                    text.rows(chunk),
                    negative and negative.rows(chunk),
                    guidance_high,
                    guidance_low,
                    feature_blocks,
                )
                for chunk in chunks + chunks[-1:] * (passes - len(chunks))
            ][: len(chunks)]
            return torch.cat([velocity for velocity, _ in chunks]), [
                torch.cat(states) for states in zip(*(s for _, s in chunks))
            ]
        if guidance <= 1.0:
            return ask(expert, latents, timestep, text, feature_blocks)
        if negative is None:
            raise TypeError("guidance needs the negative prompt's tokens: negative is None.")
        velocity, features = ask(
            expert,
            latents.repeat(2, 1, 1, 1),
            timestep.repeat(2),
            _stack_text(text, negative),
            feature_blocks,
        )
        wanted, unwanted = velocity.chunk(2)
        return unwanted + guidance * (wanted - unwanted), [states.chunk(2)[0].clone() for states in features]

    def _rows_at_once(self, latents, is_guided):
        tokens = (
            latents.shape[-2]
            * latents.shape[-1]
            // math.prod(self.config["patch_size"])
            * (2 if is_guided else 1)
        )
        return max(1, self.tokens_at_once // tokens)

    def _most_passes(self, passes, is_high):
        """Return how many passes an answer takes: of a sharded teacher as many as any rank needs, for all go
        together.
        """
        if self.mesh is None:
            return passes
        told = torch.tensor([passes, is_high, -is_high], device=self.device)
        distributed.all_reduce(told, distributed.ReduceOp.MAX, group=self.mesh.get_group())
        passes, any_high, none_low = told.tolist()
        if any_high != -none_low:
            raise RuntimeError("ranks asked different experts of a sharded teacher at the same time.")
        return passes

    def _velocity_of_both(
        self, is_high, latents, timestep, text, negative, guidance_high, guidance_low, feature_blocks
    ):
        velocity, features = torch.empty_like(latents, dtype=torch.float32), [None] * len(feature_blocks)
        for rows in (is_high, ~is_high):
            chunk, states = self.velocity(
                latents[rows],
                timestep[rows],
                text.rows(rows),
                None if negative is None else negative.rows(rows),
                guidance_high,
                guidance_low,
                feature_blocks,
            )
            velocity[rows] = chunk
            for place, state in enumerate(states):
                if features[place] is None:
                    features[place] = state.new_empty(len(latents), *state.shape[1:])
                features[place][rows] = state
        return velocity, features


def choose_residency(files, dtype, is_fp8, free_device, free_host, is_cpu=False, shares=1):
    """Return the residency that keeps most of the teacher near: of "both", "one", "sharded", "streamed",
    "disk" what fits first.

    Among so many `shares` on one machine its GPUs share the blocks out: they reach each other faster than the
    CPU's memory. `free_device` and `free_host` are bytes; what trajectories and their passes take is left free. On
    the CPU the two are one memory, and nothing is streamed from it.
    """
    size = max(expert.num_parameters for expert in files.experts.values()) * (1 if is_fp8 else dtype.itemsize)
    whole, passing = (
        size * len(files.experts),
        TOKENS_AT_ONCE * next(iter(files.experts.values())).width * BYTES_A_TOKEN,
    )
    if whole + passing <= free_device:
        return "both"
    if size + passing <= free_device and len(files.experts) > 1 and (is_cpu or whole <= free_host):
        return "one"
    if (
        shares > 1
        and not is_cpu
        and not is_fp8
        and whole / shares + SHARDED_BESIDE * size + passing <= free_device
    ):
        return "sharded"
    pinned = sum(pinned_bytes(expert, dtype, is_fp8) for expert in files.experts.values())
    return "streamed" if pinned <= free_host and not is_cpu else "disk"


def pinned_bytes(files, dtype, is_fp8):
    """Return what an expert takes of the CPU's memory where blocks are streamed from: torch pins powers of
    two.
    """
    return sum(
        2 ** (torch.Size(shape).numel() * (1 if is_fp8 else dtype.itemsize) - 1).bit_length()
        for *_, shape in files.places.values()
    )


class Expert(WanTransformer3DModel):
    """diffusers' network on single frames; it is asked by its forward, which diffusers' hooks for offloading
    and casting wrap.
    """

    _repeated_blocks = ["OneFrameBlock"]  # compile_repeated_blocks() finds blocks by the name of their class

    def forward(self, latents, timestep, text, logit_bias=None, feature_blocks=()):
        """See network.one_frame_velocity()."""
        return one_frame_velocity(self, latents, timestep, text, logit_bias, feature_blocks)


def ask(expert, latents, timestep, text, feature_blocks=()):
    """Run one expert in its own dtype; timesteps and the velocity are float32."""
    dtype = expert.patch_embedding.weight.dtype
    velocity, features = expert(
        latents.to(dtype), timestep.float(), text.tokens.to(dtype), text.logit_bias, feature_blocks
    )
    return velocity.float(), features


def load_expert(files, device="cpu", dtype=torch.float32):
    """Load one expert, frozen: a stock WanTransformer3DModel whose blocks take the text's logit bias."""
    with init_empty_weights():  # parameters without memory; the rotary tables are real
        network = make_expert(files, files.config["num_layers"])
    network.load_state_dict(_read_all(files, files.places, device, dtype), strict=True, assign=True)
    return network.to(device).eval().requires_grad_(False)


def stream_expert(files, device="cpu", dtype=torch.float32):
    """Load one expert without its blocks; each pass reads them from disk, one in memory at a time."""
    with init_empty_weights():
        network = make_expert(files, 0)
    others = [name for name in files.places if not name.startswith("blocks.")]
    network.load_state_dict(_read_all(files, others, device, dtype), strict=True, assign=True)
    network.blocks = _StreamedBlocks(files, device, dtype)
    return network.to(device).eval().requires_grad_(False)


def _read_all(files, names, device, dtype):
    """Read tensors by name; those of modules that Wan keeps in float32 stay there."""
    stays = set(WanTransformer3DModel._keep_in_fp32_modules)
    return {
        name: files.read(name, torch.float32 if set(name.split(".")) & stays else dtype).to(device)
        for name in names
    }


def shard_expert(files, device, dtype, mesh):
    """Load one expert of whose blocks each device of `mesh` keeps an equal share; a block is whole only while
    it computes.

    All ranks of the mesh have to ask it together. Every rank reads each block, one in memory at a time.
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


def machine_mesh(device):
    """Return the mesh of this machine's ranks."""
    local = int(os.environ["LOCAL_WORLD_SIZE"])
    shape = (distributed.get_world_size() // local, local)
    return init_device_mesh(device.type, shape, mesh_dim_names=("machines", "ranks"))["ranks"]


class _StreamedBlocks(nn.Module):
    def __init__(self, files, device, dtype):
        super().__init__()
        self.files, self.device, self.dtype = files, device, dtype

    def __len__(self):
        return self.files.config["num_layers"]

    def __iter__(self):
        for index in range(len(self)):
            block = self.read(index)
            yield block
            block.to("meta")  # gone before the next is read, whoever still holds it

    def read(self, index):
        """Return one block, which is the caller's to keep."""
        with init_empty_weights():
            block = _empty_block(self.files)
        prefix = f"blocks.{index}."
        names = [name for name in self.files.places if name.startswith(prefix)]
        tensors = _read_all(self.files, names, self.device, self.dtype)
        block.load_state_dict(
            {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}, strict=True, assign=True
        )
        return block.eval().requires_grad_(False)


def make_expert(files, depth):
    """Return an expert of `files`' sizes and of `depth` blocks, in the default dtype, with no weights read."""
    network = Expert(**files.config | {"num_layers": 0})
    network.blocks = nn.ModuleList(_empty_block(files) for _ in range(depth))
    return network


def _empty_block(files):
    config = files.config
    return OneFrameBlock(
        files.width,
        config["ffn_dim"],
        config["num_attention_heads"],
        config["qk_norm"],
        config["cross_attn_norm"],
        config["eps"],
    )


def _stack_text(first, second):
    """Put two sets of prompts into one batch, squaring their lengths."""
    length = max(first.tokens.shape[1], second.tokens.shape[1])
    padded = [
        TextTokens(
            nn.functional.pad(text.tokens, (0, 0, 0, length - text.tokens.shape[1])),
            nn.functional.pad(text.logit_bias, (0, length - text.logit_bias.shape[1]), value=-torch.inf),
        )
        for text in (first, second)
    ]
    return TextTokens(*(torch.cat(chunks) for chunks in zip(*padded)))
