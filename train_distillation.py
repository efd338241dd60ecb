"""Project a Wan teacher's weights into a small text-to-image student, distil it from prompts alone, save it.

    python train_distillation.py                                                     # the tiny teacher, minutes on a laptop
    python train_distillation.py --teacher ./Wan2.2-T2V-A14B --prompts prompts.txt   # one GPU box
    accelerate launch train_distillation.py --teacher ... --prompts ...              # several GPUs

Order: settings -> WanLiteStudent -> the dry run -> the loop, which goes through the stages of
wanlite/stages/. The run goes to --output_dir; run the same command after a stop and it goes on where it was.
"""

import gc
import os
import signal
import sys
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

from wanlite.files.atomic import write_json
from wanlite.files.dtypes import find_non_finite
from wanlite.files.locks import lock
from wanlite.phases import (
    MIN_TRAJECTORIES,
    choose_validated,
    count_passes,
    count_trajectories,
    count_validated,
    phases_of,
)
from wanlite.planning.resolve import (
    NAMED_TEACHERS,
    REAL_STEPS,
    REAL_TEACHERS,
    TINY_STEPS,
    complete,
    image_sizes,
)
from wanlite.planning.settings import make_parser, setting
from wanlite.runtime.launch import defer_to_rank_zero, is_first, is_launched
from wanlite.runtime.signals import Stopped, StopSignal
from wanlite.runtime.terminal import keep_output_open
from wanlite.teacher.components import check_components, find_components
from wanlite.training.run_folder import (
    MetricsLog,
    check_output_folder,
    check_resumable,
    clear,
    read_fitted_settings,
    save_components,
    write_model_card,
)
from wanlite.training.trackers import log_image

LOG_STEPS = 10
STOPPED = 3  # exit code of a run that was asked to stop and can be resumed
# validations in a row beyond a guard and no nearer to the teacher, after which the best so far is saved
PATIENCE = 2
# steps in a row without a finite gradient, after which a run ends; float16 needs some to find its scale
MAX_SKIPPED = 20
CHANGEABLE_ON_RESUME = (
    "teacher",
    "teacher_residency",
    "output_dir",
    "cache_dir",
    "dry_run",
    "overwrite",
    "resume_from_checkpoint",
    "project_only",
    "checkpointing_steps",
    "report_to",
    "checkpoints_total_limit",
    "logging_dir",
)  # decide no weight


# ---- settings ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Settings:
    teacher: str | None = setting(
        None,
        "Wan folder, diffusers, official or ComfyUI layout, or a teacher of this repository, "
        f"{' or '.join(NAMED_TEACHERS)}; None = ./{REAL_TEACHERS[0]} if there is one, else tiny",
        aliases=("--teacher_checkpoint_path", "--teacher_path"),
        is_path=True,
    )
    prompts: str | None = setting(
        None,
        "text file, one prompt a line, or .jsonl, .json, .csv, .tsv, .parquet with a column "
        "prompt, text or caption; None = a grammar's prompts, for the tiny teacher captions of its world",
        is_path=True,
    )
    images: str | None = setting(
        None,
        "captioned images that stage 1 learns from too: a folder with a .txt beside each or "
        "metadata.jsonl or .csv, .parquet files, a folder saved by datasets, or webdataset's .tar files",
        is_path=True,
    )
    num_images: int | None = setting(None, "of them, the first so many that can be used; None = all", least=1)
    output_dir: str = setting("./outputs/wan_t2i", "where everything is written", is_path=True)
    cache_dir: str | None = setting(
        None,
        "projected starts and trajectories, which runs may share; None = cache/ in --output_dir",
        is_path=True,
    )
    dry_run: bool = setting(False, "say what a run will do and need, and stop; nothing is written")
    overwrite: bool = setting(False, "replace a finished run in --output_dir")
    resume_from_checkpoint: str = setting(
        "latest", "go on where a run was cut short, or start again", choices=("latest", "none")
    )

    hidden_size: int | None = setting(
        None, "student width; None = 1024, for a small teacher half its width", least=1
    )
    depth: int | None = setting(None, "student blocks; None = 16, for a small teacher its depth", least=1)
    num_heads: int | None = setting(None, "student heads; None = heads of half the teacher's size", least=1)
    ffn_dim: int | None = setting(None, "width inside the feed-forward; None = 4 * hidden_size", least=1)
    projection: str = setting(
        "calibrated",
        "how the student starts: from the teacher's weights, these refitted to what the "
        "teacher computes, or random as a control",
        choices=("weights", "calibrated", "none"),
    )
    expert: str = setting(
        "high",
        "which of two experts is projected; span = for each block the one that keeps more, from weights only",
        choices=("low", "high", "best_per_block"),
    )
    project_only: bool = setting(
        False, "save the projected start in --output_dir and stop; later runs there reuse it"
    )
    student: str | None = setting(None, "a saved student to go on from, instead of projecting", is_path=True)

    guidance_scale: float = setting(
        4.0,
        "guidance of the high-noise expert, or of the only one; baked into the student",
        least=1,
        most=100,
    )
    guidance_scale_2: float = setting(
        3.0, "guidance of the low-noise expert; baked into the student", least=1, most=100
    )
    negative_prompt: str = setting("", "what guidance steers away from")
    flow_shift: float | None = setting(
        None, "shift of the noise schedule; None = what the teacher's scheduler says", above=0, most=100
    )
    resolution: list[int] | int | None = setting(
        None,
        "pixels, one number for squares, or WIDTH HEIGHT; divisible by 16, for "
        "TI2V-5B by 32; None = the teacher's own, else 512",
    )
    aspect_ratios: list[str] | None = setting(
        None,
        "WIDTH:HEIGHT of what is trained on, as 1:1 3:2 2:3, all of about the area of "
        "--resolution, which validations keep; None = that of --resolution",
    )
    teacher_residency: str = setting(
        "auto",
        "where its experts are while they are asked: both on the device; one there, the other "
        "in CPU memory; sharded over a machine's GPUs; streamed from CPU memory block by block; "
        "read from disk at each pass; auto = the first of these that fits",
        choices=("auto", "both", "one", "sharded", "streamed", "disk"),
    )
    teacher_fp8: bool = setting(False, "keep the experts' matrices in float8, in half the memory")
    teacher_steps: int = setting(20, "guided steps of a teacher trajectory", least=1, most=1000)
    num_trajectories: int | None = setting(
        None,
        f"teacher pictures to learn from; None = one a prompt, at least {MIN_TRAJECTORIES}: of few "
        "prompts several, from different noise",
        least=1,
    )

    num_held_out: int = setting(
        400, "prompts that are never trained on; at most a twentieth of a prompts file", least=1
    )

    train_batch_size: int | None = setting(
        None,
        "states in a micro-batch, on each device; None = 128 or all there are, of a large "
        "teacher's student as many of them as fit",
        least=1,
    )
    max_train_steps: int | None = setting(
        None,
        "optimizer steps in all; what --few_step_train_steps and --matching_steps leave is stage "
        f"1; None = {TINY_STEPS}, of any teacher but the tiny one {REAL_STEPS}",
        least=1,
    )
    few_step_train_steps: int | None = setting(
        None, "stage 2a: of them, steps towards the teacher's pictures; None = 5 of 7", least=0
    )
    matching_steps: int = setting(
        0, "stage 2b: of them, the last, steps of distribution matching with a critic", least=0
    )
    few_steps: list[int] = setting(
        (1, 2, 4), "numbers of steps that stage 2 trains for; divisors of --teacher_steps", least=1
    )
    rollout_states: int | None = setting(
        None,
        "states on the student's own path, continued by the teacher, twice in stage 2a; "
        "None = 512, at most one for each trajectory, of a large teacher for eight",
        least=0,
    )
    gradient_accumulation_steps: int | None = setting(
        None,
        "micro-batches in a step; None = as many as make up 128 states where "
        "--train_batch_size is open, else 1",
        least=1,
    )
    learning_rate: float = setting(3e-3, "peak of AdamW's learning rate", above=0, most=1)
    lr_scheduler: str = setting(
        "cosine", "as in diffusers", choices=("cosine", "linear", "constant_with_warmup")
    )
    lr_warmup_steps: int = setting(100, "steps until the peak", least=0)
    muon_learning_rate: float = setting(
        0.09, "peak of Muon's, for the matrices of the blocks; 0 = AdamW for all", least=0, most=10
    )
    adam_beta2: float = setting(0.99, "decay of AdamW's second moment", least=0, below=1)
    adam_weight_decay: float = setting(0.01, "decoupled weight decay", least=0, most=1)
    max_grad_norm: float = setting(1.0, "gradients are clipped to this norm", above=0)
    feature_weight: float = setting(
        3.0, "weight of the feature loss at the start of stage 1, falling to 0 at its end", least=0
    )
    feature_directions: int | None = setting(
        None,
        "directions in which token states are compared, those in which the teacher's "
        "vary most; None = a quarter of the student's width",
        least=1,
    )
    diversity_gain: float = setting(
        0.3,
        "stage 2: how much farther apart than the teacher's the pictures of a prompt are aimed at, "
        "as they come out nearer to each other; 0 = regression alone",
        least=0,
        most=10,
    )
    anchor_weight: float = setting(
        1.0, "stage 2b: weight of stage 2a's loss beside distribution matching", least=0
    )
    critic_learning_rate: float = setting(
        5e-4, "stage 2b: the critic's; its Muon has the student's ratio to it", above=0, most=1
    )
    critic_updates: int = setting(3, "stage 2b: updates of the critic for one of the student", least=1)
    critic_lerp: float = setting(
        0.03, "stage 2b: how far the critic moves to the student after each of its updates", least=0, most=1
    )
    use_ema: bool = setting(True, "save an exponential moving average of the weights")
    ema_decay: float = setting(0.998, "its decay a step", least=0, below=1)
    mixed_precision: str | None = setting(
        None,
        "as in accelerate; master weights and losses stay in float32; None = what "
        "accelerate launch says, else bf16 for a large teacher on a GPU, else no",
        choices=("no", "bf16", "fp16"),
    )
    gradient_checkpointing: bool = setting(False, "recompute blocks in the backward pass to save memory")
    compile: bool = setting(
        False, "compile the student's blocks: minutes at first, faster steps then; needs a C++ compiler"
    )
    allow_tf32: bool = setting(
        False, "on CUDA, multiply float32 matrices with TF32's shorter mantissas while training"
    )

    checkpointing_steps: int = setting(500, "steps between resumable checkpoints", least=1)
    checkpoints_total_limit: int = setting(2, "newest checkpoints to keep, at least 2", least=2)
    validation_steps: int = setting(
        350, "steps between validations: figures, a grid, and a candidate to be saved", least=1
    )
    validation_trajectories: int | None = setting(
        None,
        "the most teacher pictures of a kind that validations are held against; None = "
        "64, of a large teacher one for twenty trajectories, at least 4",
        least=4,
        most=64,
    )
    reference_steps: int | None = setting(
        None, "guided steps of the teacher in the grids; None = twice --teacher_steps", least=1, most=1000
    )
    validation_prompts: list[str] | None = setting(
        None, "prompts of the grids; None = eight, held-out ones first"
    )
    num_inference_steps: int = setting(
        4, "steps in which the student draws; goes to run.json as its default", least=1, most=1000
    )
    report_to: str = setting(
        "tensorboard", "tracker, as in accelerate: tensorboard, wandb, ...; 'none' for metrics.jsonl alone"
    )
    logging_dir: str = setting("logs", "tracker files, inside --output_dir", is_path=True)
    seed: int = setting(0, "seed of everything random", least=0, below=2**32)


def read_settings():
    """Read the command line and check everything that needs no torch; ends with one line and exit code 2
    where it is wrong.

    Returns the settings with every None filled that a folder or file decides, and whether a run cut short
    goes on.
    """
    parser = make_parser(Settings, __doc__)
    settings = Settings(**vars(parser.parse_args()))
    try:
        settings = complete(settings)
        is_resumed = not settings.dry_run and is_cut_short(settings)  # a dry run says it beside all else
    except (OSError, ValueError) as error:
        parser.error(str(error))
    if not settings.dry_run:
        try:
            Path(settings.output_dir).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            parser.error(
                f"--output_dir {settings.output_dir}: cannot be made ({error.strerror}). Name another."
            )
    return settings, is_resumed


def is_cut_short(settings):
    """Whether --output_dir holds a run of these settings that was cut short and goes on; see
    check_output_folder().
    """
    decisive = {name: value for name, value in asdict(settings).items() if name not in CHANGEABLE_ON_RESUME}
    state = check_output_folder(
        settings.output_dir, decisive, settings.overwrite, settings.resume_from_checkpoint != "none"
    )
    if state == "resume" and settings.project_only:
        raise ValueError(
            f"{settings.output_dir}: holds a run cut short. Leave --project_only out to resume it, add "
            f"--overwrite to "
            "replace it, or name another --output_dir."
        )
    return state == "resume"


if __name__ == "__main__":  # arguments and paths are answered before torch is imported, which takes seconds
    keep_output_open()
    gc.disable()  # imports make a million objects, and all of them stay
    signal.signal(
        signal.SIGINT, signal.SIG_DFL
    )  # ends it at once and silently, until a run has something to lose
    os.environ.setdefault(
        "GOMP_SPINCOUNT", "5000"
    )  # threads that spin long at barriers stall beside any other busy program
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_MININTERVAL", "10")  # seconds between two lines of progress in a log
    SETTINGS, IS_RESUMED = read_settings()

import copy
import hashlib
import inspect
import json
import math
import time
from collections.abc import Callable, Mapping
from contextlib import contextmanager, suppress
from itertools import chain
from typing import Any

import torch
from accelerate import Accelerator, init_empty_weights
from accelerate.utils import ProjectConfiguration, set_seed
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.normalization import FP32LayerNorm
from diffusers.models.transformers.transformer_wan import (
    WanRotaryPosEmbed,
    WanTimeTextImageEmbedding,
    WanTransformer3DModel,
)
from diffusers.training_utils import EMAModel
from diffusers.utils.peft_utils import apply_lora_scale
from torch import nn
from tqdm import tqdm

from wanlite.data.autoencoder import load_autoencoder
from wanlite.data.grids import save_grid
from wanlite.data.prefetch import PREFETCHED_BATCHES, read_ahead
from wanlite.data.text_encoder import load_tokenizer, tell_cut
from wanlite.data.trajectories import Buckets, FewStepStates, SeededBatches
from wanlite.files.cache import fingerprint
from wanlite.flow import FewSteps, make_scheduler
from wanlite.network import TEXT_LENGTH, OneFrameBlock, TextTokens, one_frame_velocity
from wanlite.planning.defaults import choose_data, choose_shape, describe_schedule
from wanlite.planning.estimate import (
    FITTED,
    MemoryEstimator,
    calibration_frames,
    choose_precision,
    feature_width,
    is_large,
    most_frames,
    place_teacher,
    training_dtype,
)
from wanlite.planning.memory import estimate, matrix_rate
from wanlite.planning.messages import (
    PROJECTING,
    announce,
    announce_few,
    command,
    conclude,
    count_teacher_images,
    describe_work,
    drawing_command,
    verdict,
    versions,
)
from wanlite.runtime.devices import as_device, as_dtype, disable_cudnn_attention, has_gpu
from wanlite.runtime.ranks import (
    abort_all_ranks,
    broadcast,
    check_devices,
    is_peer_failure,
    process_group_options,
)
from wanlite.student.calibration import PASSES as CALIBRATING_PASSES
from wanlite.student.initialization import compare_experts, project_into, start_student
from wanlite.student.loading import (
    OUR_NAMES,
    all_tensor_shapes,
    check_hashes,
    check_shape,
    check_variant,
    check_weights,
    open_student,
    pinned_hashes,
    student_arguments,
    student_folder,
)
from wanlite.student.saving import check_savable, plain_names, save_student
from wanlite.teacher.checkpoint import open_teacher_files
from wanlite.teacher.model import Teacher
from wanlite.training.checkpoints import latest_checkpoint, load_checkpoint, restore, save_checkpoint
from wanlite.training.metrics import find_guard_violations
from wanlite.training.optimizers import make_lr_schedulers, make_optimizers
from wanlite.training.steps import STEPS, Networks
from wanlite.training.teacher_data import PromptEmbeddings, TeacherData, feature_block, open_components
from wanlite.training.throughput import Pace, in_brief
from wanlite.training.validation import Validator

# ---- the model ---------------------------------------------------------------------------------------------


@dataclass
class StudentOutput(Transformer2DModelOutput):
    features: list | None = None


class WanLiteStudent(WanTransformer3DModel):
    """A small Wan transformer that draws single frames, in diffusers' blocks and under diffusers' key names.

    `WanLiteStudent(hidden_size=64, depth=4, num_heads=2)` or `WanLiteStudent({"hidden_size": 64, ...})`
    builds a random one; `teacher_checkpoint_path=DIR` projects that teacher's weights into it, once, and is
    not in the config. Its config has every setting of a stock WanTransformer3DModel beside ours; its
    config.json is that of a stock one.
    """

    _no_split_modules = ["OneFrameBlock"]
    _repeated_blocks = ["OneFrameBlock"]
    _cp_plan = None  # one frame is too short to be split over devices
    _left_to_stock = (
        "max_memory",
        "offload_folder",
        "offload_state_dict",
        "use_flashpack",
    )  # a pipeline says no to them
    ignore_for_config = ["teacher_checkpoint_path", "projection", "expert"]

    def __init__(
        self,
        hidden_size: int | Mapping = 1024,  # or a whole config
        depth: int = 16,
        num_heads: int = 16,
        ffn_dim: int | None = None,  # None: 4 * hidden_size
        num_channels: int = 16,  # of the latents
        text_dim: int = 4096,
        freq_dim: int = 256,
        patch_size: tuple[int, int, int] = (1, 2, 2),
        cross_attn_norm: bool = True,
        qk_norm: str = "rms_norm_across_heads",
        eps: float = 1e-6,
        rope_max_seq_len: int = 1024,
        teacher_checkpoint_path: str | None = None,
        projection: str = "weights",  # "weights" or "none"
        expert: str = "low",  # which of two experts is projected
    ):
        super(WanTransformer3DModel, self).__init__()  # stock's own would build stock's blocks
        self.__module__ = WanTransformer3DModel.__module__  # see below the class
        if isinstance(hidden_size, Mapping):
            config = {name: value for name, value in hidden_size.items() if not name.startswith("_")}
            return self.__init__(
                **{
                    "teacher_checkpoint_path": teacher_checkpoint_path,
                    "projection": projection,
                    "expert": expert,
                    **student_arguments(config, _defaults()),
                }
            )
        ffn_dim = ffn_dim or 4 * hidden_size
        check_shape(
            patch_size,
            eps,
            cross_attn_norm,
            qk_norm,
            hidden_size=hidden_size,
            depth=depth,
            num_heads=num_heads,
            ffn_dim=ffn_dim,
            num_channels=num_channels,
            text_dim=text_dim,
            freq_dim=freq_dim,
            rope_max_seq_len=rope_max_seq_len,
        )
        head_dim, patch_size = hidden_size // num_heads, (1, patch_size[1], patch_size[2])
        self.register_to_config(
            hidden_size=hidden_size,
            depth=depth,
            num_heads=num_heads,
            ffn_dim=ffn_dim,
            num_channels=num_channels,
            text_dim=text_dim,
            freq_dim=freq_dim,
            patch_size=patch_size,
            cross_attn_norm=cross_attn_norm,
            qk_norm=qk_norm,
            eps=eps,
            rope_max_seq_len=rope_max_seq_len,
            num_attention_heads=num_heads,
            attention_head_dim=head_dim,
            num_layers=depth,
            in_channels=num_channels,
            out_channels=num_channels,
            image_dim=None,
            added_kv_proj_dim=None,
            pos_embed_seq_len=None,
        )

        self.rope = WanRotaryPosEmbed(head_dim, patch_size, rope_max_seq_len)
        self.patch_embedding = nn.Conv3d(num_channels, hidden_size, kernel_size=patch_size, stride=patch_size)
        self.condition_embedder = WanTimeTextImageEmbedding(hidden_size, freq_dim, 6 * hidden_size, text_dim)
        self.blocks = nn.ModuleList(
            OneFrameBlock(hidden_size, ffn_dim, num_heads, qk_norm, cross_attn_norm, eps)
            for _ in range(depth)
        )
        self.norm_out = FP32LayerNorm(hidden_size, eps, elementwise_affine=False)
        self.proj_out = nn.Linear(hidden_size, num_channels * math.prod(patch_size))
        self.scale_shift_table = nn.Parameter(torch.empty(1, 2, hidden_size))
        self.gradient_checkpointing = False

        if not self.proj_out.weight.is_meta:
            self.initialise()
        if teacher_checkpoint_path is not None and projection != "none":
            project_into(self, teacher_checkpoint_path, expert)

    @torch.no_grad()
    def initialise(self):
        """Random start, as a stock WanTransformer3DModel has it, with a silent output."""
        for table in [self.scale_shift_table, *(block.scale_shift_table for block in self.blocks)]:
            nn.init.normal_(table, std=self.config.hidden_size**-0.5)
        nn.init.zeros_(self.proj_out.weight)
        nn.init.zeros_(self.proj_out.bias)

    @apply_lora_scale("attention_kwargs")
    def forward(
        self,
        hidden_states: torch.Tensor,  # (B, C, H, W), or (B, C, 1, H, W) as a pipeline gives
        timestep: torch.Tensor,  # (B,) in 0..1000, or (B, N) with equal rows
        encoder_hidden_states: torch.Tensor | TextTokens,  # (B, L, T)
        encoder_hidden_states_image: torch.Tensor | None = None,
        return_dict: bool = True,
        attention_kwargs: dict | None = None,
        text_logit_bias: torch.Tensor | None = None,  # (B, L); None: every token counts once
        feature_blocks: tuple[int, ...] = (),
    ) -> StudentOutput | tuple:
        """Return the velocity in the shape of `hidden_states`, and the token states after `feature_blocks`
        where asked.
        """
        is_video = hidden_states.ndim == 5
        if is_video and hidden_states.shape[2] != 1:
            raise ValueError(
                f"latents have {hidden_states.shape[2]} frames; the student draws single frames: "
                f"num_frames=1."
            )
        if encoder_hidden_states_image is not None:
            raise ValueError(
                "encoder_hidden_states_image was given; the student is a text-to-image model without it."
            )
        latents = hidden_states.squeeze(2) if is_video else hidden_states
        self._check_size(*latents.shape[-2:])
        if isinstance(encoder_hidden_states, TextTokens):
            encoder_hidden_states, text_logit_bias = encoder_hidden_states
        if timestep.ndim == 2:
            if (timestep != timestep[:, :1]).any():
                raise ValueError(
                    "timesteps differ between the tokens of a picture; the student takes one a picture: (B,)."
                )
            timestep = timestep[:, 0]
        velocity, features = one_frame_velocity(
            self, latents, timestep, encoder_hidden_states, text_logit_bias, feature_blocks
        )
        velocity = velocity.unsqueeze(2) if is_video else velocity
        if return_dict:
            return StudentOutput(sample=velocity, features=features or None)
        return (velocity, features) if feature_blocks else (velocity,)

    def _check_size(self, height, width):
        """Refuse latents that are not whole patches or lie beyond the rotary table."""
        for name, size, patch in zip(("high", "wide"), (height, width), self.config.patch_size[1:]):
            if size % patch or size // patch > self.config.rope_max_seq_len:
                raise ValueError(
                    f"latents are {size} {name}, expected a multiple of {patch} up to "
                    f"{patch * self.config.rope_max_seq_len}, where this student's rotary table ends. Choose "
                    f"another "
                    "height or width."
                )

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        is_main_process: bool | None = None,
        save_function: Callable | None = None,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str = "10GB",
        push_to_hub: bool = False,
        **kwargs,
    ) -> None:
        """Save config and weights so that a reader finds the student that was there or this one, never a
        mixture.

        Every rank may call it; where `is_main_process` is None, rank 0 writes. `save_function` is accepted
        and not used. `kwargs` are those of push_to_hub. Raises ValueError for weights that would not load
        again: not finite, on no device, or with an adapter among them.
        """
        if kwargs and not push_to_hub:
            raise TypeError(
                f"WanLiteStudent.save_pretrained does not take {', '.join(sorted(kwargs))} without "
                f"push_to_hub."
            )
        if not safe_serialization:
            raise ValueError(
                "safe_serialization=False asks for a pickle; students are saved as safetensors only. Leave "
                "it out."
            )
        check_variant(variant)
        if not str(save_directory):
            raise ValueError("save_directory is empty, expected a folder.")
        if (
            not isinstance(max_shard_size, (int, str))
            or isinstance(max_shard_size, int)
            and max_shard_size < 1
        ):
            raise ValueError(
                f"max_shard_size is {max_shard_size!r}, expected bytes, at least 1, or text as '5GB'."
            )
        if is_main_process is None:
            is_main_process = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
        tensors = plain_names(self.state_dict())  # of a sharded student every rank has to take part
        if not is_main_process:
            return
        check_savable(tensors, all_tensor_shapes(self.config), save_directory)
        save_student(save_directory, self.to_json_string(), tensors, variant, max_shard_size)
        if push_to_hub:
            self.push_to_hub(kwargs.pop("repo_id", Path(save_directory).name), variant=variant, **kwargs)

    def to_json_string(self) -> str:
        """Return the config as a stock Wan has it, without our names for the same: stock warns of names that
        are not its own.
        """
        config = json.loads(super().to_json_string())
        return (
            json.dumps(
                {name: value for name, value in config.items() if name not in OUR_NAMES},
                indent=2,
                sort_keys=True,
            )
            + "\n"
        )

    @classmethod
    def from_single_file(
        cls, pretrained_model_link_or_path_or_dict: Any = None, *, config: str | None = None, **kwargs
    ) -> Any:
        """Load one file of weights under diffusers' names or Wan's own, as stock does; `config` is the folder
        of config.json.
        """
        if config is None:
            raise ValueError(
                "config is missing, expected the folder of the student's config.json: weights alone do not "
                "show it."
            )
        try:
            return super().from_single_file(
                pretrained_model_link_or_path_or_dict, config=str(config), **kwargs
            )
        except NotImplementedError:  # a tensor without values is to be moved
            raise ValueError(
                f"{pretrained_model_link_or_path_or_dict}: lacks tensors of the student that {config} "
                f"describes. "
                "Name the file and the config of one student."
            ) from None

    @classmethod
    def extract_init_dict(cls, config_dict: Mapping, **kwargs):
        """Turn a config under our names, Wan's or both into arguments: from_config alone would take our
        defaults for Wan's.
        """
        return super().extract_init_dict(student_arguments({**config_dict}, _defaults()), **kwargs)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike,
        *,
        subfolder: str | None = None,
        variant: str | None = None,
        dtype: torch.dtype | str | None = None,
        torch_dtype: torch.dtype | str | None = None,
        device: torch.device | str | int | None = None,
        device_map: Mapping | torch.device | str | int | None = None,
        low_cpu_mem_usage: bool = True,
        use_safetensors: bool | None = True,
        disable_mmap: bool = False,
        output_loading_info: bool = False,
        local_files_only: bool = False,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike | None = None,
        force_download: bool = False,
        sha256: str | Mapping[str, str] | None = None,
        **unknown: Any,
    ) -> Any:  # a WanLiteStudent; with `output_loading_info` a pair, as in diffusers
        """Load a saved student from a folder or the hub: exactly its weights, on the CPU unless told
        otherwise, in eval mode.

        Never projects and needs no teacher. `dtype` (or `torch_dtype`, a torch.dtype or its name) leaves the
        modules that Wan keeps in float32 there; None keeps every dtype as saved. `sha256` pins the weights to
        a digest. With it, or with `output_loading_info`, whose "sha256" is {file name: digest}, weights are
        hashed as they are read; else a CPU student in its saved dtype is mapped, and shares its file's fate
        unless `disable_mmap`. Nothing is built before header and config are known to agree. Raises OSError
        for files that are missing or broken and ValueError for content that is not this student's. Memory is
        used once whatever `low_cpu_mem_usage` says.
        """
        if unknown := {
            name: value for name, value in unknown.items() if value or name not in cls._left_to_stock
        }:
            accepted = ", ".join(list(inspect.signature(cls.from_pretrained).parameters)[1:-1])
            raise TypeError(
                f"WanLiteStudent.from_pretrained does not take {', '.join(sorted(unknown))}; it takes "
                f"{accepted}. "
                "Loading never projects a teacher and never quantises: quantise the student that is loaded."
            )
        if use_safetensors is False:
            raise ValueError(
                "use_safetensors=False asks for a pickle, and pickles are never opened. Leave it out."
            )
        dtype, device = (
            as_dtype(torch_dtype if dtype is None else dtype),
            as_device(device_map if device is None else device),
        )
        folder = student_folder(
            pretrained_model_name_or_path,
            subfolder,
            local_files_only=local_files_only,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            force_download=force_download,
        )
        with open_student(folder, variant) as (config, files):
            try:
                arguments = student_arguments(config, _defaults())
            except ValueError as error:
                raise ValueError(f"{files[0].path.parent / 'config.json'}: {error}") from None
            check_weights(files, arguments)
            pinned, tensors = pinned_hashes(files, sha256), {}
            is_hashed = pinned is not None or output_loading_info
            for name, tensor in chain.from_iterable(
                file.tensors(not disable_mmap, is_hashed) for file in files
            ):
                tensors[name] = tensor.to(device, None if _stays_float32(name) else dtype)
            check_hashes(files, pinned)
            for name in find_non_finite(tensors):
                path = next(file.path for file in files if name in file.entries)
                raise ValueError(
                    f"{path}: {name} holds NaN or infinity as {tensors[name].dtype}. Take an earlier save, "
                    f"or a dtype "
                    "of more range."
                )
        # Parameters are without memory, rotary tables are real, and the user's random numbers are not used
        # up.
        with init_empty_weights(), torch.random.fork_rng(devices=[]):
            student = cls(**arguments)
        student.load_state_dict(tensors, strict=True, assign=True)
        student.register_to_config(_name_or_path=str(pretrained_model_name_or_path))
        student.rope.to(device)  # all else is there
        student.eval()
        info = {
            "missing_keys": [],
            "unexpected_keys": [],
            "mismatched_keys": [],
            "error_msgs": [],
            "sha256": {file.path.name: file.sha256 for file in files},
        }
        return (student, info) if output_loading_info else student


# A student is saved as the stock Wan that it also is. Pipelines write a component's class by these names of the
# class and of its module, and load it by them where this file is not.
WanLiteStudent.__name__ = WanTransformer3DModel.__name__


def _defaults():
    """Return {name: default} of the arguments that make up a config."""
    parameters = inspect.signature(WanLiteStudent.__init__).parameters.values()
    return {
        parameter.name: parameter.default
        for parameter in parameters
        if parameter.name not in ("self", *WanLiteStudent.ignore_for_config)
    }


def _stays_float32(name):
    return any(module in WanLiteStudent._keep_in_fp32_modules for module in name.split("."))


# ---- the dry run -------------------------------------------------------------------------------------------


def plan(settings, words):
    """Say what a run of these settings will do and need, and whether it fits; nothing is read but headers,
    nothing is written.

    `words` are those of the command line. Returns the exit code: 0 where it fits, 2 where it does not.
    """
    device, asked = torch.device("cuda" if has_gpu() else "cpu"), settings
    files = open_teacher_files(settings.teacher)
    found = find_components(settings.teacher)
    check_components(found, files.config)
    phases, sizes, settings = phases_of(settings), image_sizes(settings), choose_precision(settings, files)
    needs = MemoryEstimator(settings, files, WanLiteStudent, choose_shape(settings, files), sizes, device)
    training, held_out, images = choose_data(settings, sizes[1:], print)
    prompts = [*training, *held_out, *(settings.validation_prompts or ()), settings.negative_prompt]
    long = [
        prompt for prompt in prompts if len(prompt.encode()) >= TEXT_LENGTH
    ]  # a token has at least one byte
    if long and found["tokenizer"].is_dir():
        tell_cut(load_tokenizer(found["tokenizer"]), long, print)
    num_generated, validated = (
        count_trajectories(settings, len(training)),
        choose_validated(training, held_out),
    )
    settings = needs.fit(settings, num_generated)
    num_generated += len(images)  # each is asked about as often
    passes = count_passes(settings, num_generated, len(validated), phases)
    work = PROJECTING if settings.project_only else describe_work(settings, num_generated, passes, phases)
    announce(settings, files, needs.student, device, work, print)
    if not settings.project_only:
        announce_few(num_generated, len(training), len(held_out), print)
    wrong = needs.tell(settings, training, held_out, images)
    passes = CALIBRATING_PASSES * calibration_frames(settings, training, needs.tokens) + (
        0 if settings.project_only else passes
    )
    states = 0 if settings.project_only else count_teacher_images(settings)
    print(
        "time     "
        + estimate(
            needs.student,
            files,
            passes,
            states,
            needs.tokens,
            needs.latent_shape[1:],
            device,
            training_dtype(settings),
        )
    )
    try:
        is_cut_short(asked)
    except (OSError, ValueError) as error:
        wrong.append(str(error))
    for reason in wrong:
        print(f"PROBLEM  {reason}")
    print(f"run      {command(Path(__file__).name, *words)}")
    return 2 if wrong else 0


# ---- the loop ----------------------------------------------------------------------------------------------


def train(settings, is_resumed, stop):
    """Project, generate trajectories, distil, validate and save into settings.output_dir; raises Stopped where
    `stop` asks for it.
    """
    began, output = time.time(), Path(settings.output_dir)
    check_devices(os.environ)
    files = open_teacher_files(settings.teacher)
    fitted = (
        replace(settings, **read_fitted_settings(output)) if is_resumed else choose_precision(settings, files)
    )
    accelerator = Accelerator(
        kwargs_handlers=[process_group_options()],
        mixed_precision=fitted.mixed_precision,
        log_with=None if settings.report_to == "none" else settings.report_to,
        project_config=ProjectConfiguration(
            project_dir=str(output), logging_dir=str(output / settings.logging_dir)
        ),
    )
    device, say, ranks = accelerator.device, accelerator.print, accelerator.num_processes
    set_seed(settings.seed)
    disable_cudnn_attention()

    # What there is: teacher, student, prompts.
    check_components(find_components(settings.teacher), files.config)
    shape, sizes = choose_shape(settings, files), image_sizes(settings)
    needs = MemoryEstimator(settings, files, WanLiteStudent, shape, sizes, device)
    student = WanLiteStudent(shape)  # its memory is not yet taken
    with (
        accelerator.main_process_first()
    ):  # one rank figures_by_steps at images, the others read what it found
        training, held_out, images = choose_data(settings, sizes[1:], say, accelerator.is_main_process)
    num_trajectories, phases = count_trajectories(settings, len(training)), phases_of(settings)
    asked, settings = settings, broadcast(needs.fit(fitted, num_trajectories, ranks))
    micro_batches = accelerator.gradient_accumulation_steps = settings.gradient_accumulation_steps
    validated = choose_validated(training, held_out)
    validation = (
        settings.validation_prompts
        or validated[: count_validated(settings.validation_trajectories, len(validated))[1]]
    )
    few_steps = settings.few_steps if phases[-1][0] != "velocity" else []
    run = {
        "settings": asdict(asked),
        "versions": versions(),
        "teacher": files.fingerprint,
        "student": shape,
        "prompts": fingerprint([training, held_out]),
        "images": fingerprint([image.sha256 for image in images]),
        "processes": ranks,
        "fitted": {name: getattr(settings, name) for name in FITTED},
        "student_parameters": student.num_parameters(),
        "finished": False,
        "validation_prompts": validation,
        "num_inference_steps": settings.num_inference_steps,
        "resolution": settings.resolution,
        "schedule": describe_schedule(settings, few_steps, phases),
    }
    if is_resumed:
        check_resumable(output, run, say)
    num_generated = num_trajectories + len(
        images
    )  # an image is asked about as often as a trajectory has states
    passes = count_passes(settings, num_generated, len(validated), phases)
    work = PROJECTING if settings.project_only else describe_work(settings, num_generated, passes, phases)
    announce(settings, files, student, device, work, say)
    if not settings.project_only:
        announce_few(num_generated, len(training), len(held_out), say)
    if is_large(files):
        wrong = needs.tell(settings, training, held_out, images) if accelerator.is_main_process else []
        abort_all_ranks(accelerator, "\n".join(wrong))
    if accelerator.is_main_process and not is_resumed:
        compare_experts(settings, files, device)  # before anything is made of them
    components_folder = open_components(settings, accelerator)
    words = PromptEmbeddings(
        accelerator,
        components_folder,
        settings.cache_dir,
        list(dict.fromkeys([*training, *held_out, *validation, settings.negative_prompt])),
    )
    autoencoder, dtype = load_autoencoder(components_folder, device=device), training_dtype(settings)
    if not settings.project_only:
        say(
            "time     "
            + estimate(
                student,
                files,
                passes,
                count_teacher_images(settings),
                needs.tokens,
                needs.latent_shape[1:],
                device,
                dtype,
            )
        )
    if settings.aspect_ratios:
        say(f"sizes    {', '.join(f'{width} x {height}' for width, height in sizes[1:])}")
    (output / "cache").mkdir(exist_ok=True)
    is_taken = accelerator.is_main_process and lock(output / "cache") is None  # held until the process ends
    abort_all_ranks(
        accelerator,
        is_taken and f"{output}: another run is writing there. Wait for it, or name another --output_dir.",
    )
    run["projection"] = start_student(
        settings,
        student,
        files,
        words,
        training[: most_frames(needs.tokens)],
        needs.latent_shape[1:],
        accelerator,
    )
    if settings.project_only:
        if accelerator.is_main_process:
            save_start(output, settings, student, components_folder, run)
        return accelerator.end_training()

    # The trajectories: generated once, for training and for held-out prompts, and where students will be
    # held against it.
    teacher = Teacher(
        files, device, dtype, broadcast(place_teacher(settings, files, device)), settings.teacher_fp8
    )
    pace, width = (
        Pace(device, matrix_rate(device, dtype), ranks),
        feature_width(settings, shape["hidden_size"]),
    )
    teacher_data = TeacherData(
        accelerator,
        settings,
        teacher,
        words,
        training,
        held_out,
        [needs.latent_shape, *needs.buckets],
        width,
        pace,
    )
    teacher_data.find_basis()
    pace.restart()
    trajectories = teacher_data.generate_training(num_trajectories)
    pictured = teacher_data.ask_at_images(
        images if phases[0][0] == "velocity" else [], sizes[1:], autoencoder
    )
    validation_trajectories = teacher_data.generate_validation()
    generation_figures = pace.generation_figures(settings.teacher_steps)
    if generation_figures:
        say(
            "generated {generated:,} trajectories, {trajectories_per_second:.3g} a second, {generation_teacher_share:.0%} of "
            "the time in the "
            "teacher".format(**generation_figures)
        )
    few = FewSteps(
        settings.flow_shift,
        few_steps or [settings.num_inference_steps],
        needs.latent_shape,
        settings.teacher_steps,
        (accelerator.process_index, ranks),
    )
    own_scheduler = few.scheduler if few_steps else teacher_data.scheduler
    validator = Validator(
        teacher_data,
        *validation_trajectories,
        validation,
        few.counts,
        own_scheduler,
        autoencoder,
        stop.check if ranks == 1 else lambda: None,
    )  # several ranks stop together, at a step
    if accelerator.is_main_process:
        if not is_resumed:  # an earlier run goes only now, when this one has all to begin with
            clear(output)
        write_json(output / "run.json", run)
    accelerator.wait_for_everyone()
    if not (output / "run.json").exists():
        raise OSError(
            f"{output}: what rank 0 wrote there is not here. The machines of a run need one disk under "
            f"--output_dir."
        )

    # What learns, and how; all of it is in `memory`, and nothing else has to be remembered.
    set_seed(settings.seed)  # again: what lay in the cache has drawn no numbers
    if (
        settings.allow_tf32 and device.type == "cuda"
    ):  # only now: a projection solves for weights in full float32
        torch.set_float32_matmul_precision("high")
    student, head = student.to(device), nn.Linear(shape["hidden_size"], width).to(device)
    if settings.gradient_checkpointing:
        student.enable_gradient_checkpointing()
    optimizers = make_optimizers(settings, student, head, is_fused=device.type == "cuda")
    lr_schedulers = make_lr_schedulers(settings, optimizers)
    ema = EMAModel(student.parameters(), decay=settings.ema_decay, foreach=device.type == "cuda")
    wrapped, wrapped_head, *_ = accelerator.prepare(student, head, *optimizers)  # whose gradients it unscales
    networks = Networks(
        wrapped, wrapped_head, feature_block(shape["depth"]), teacher_data.guided, teacher_data.plain, few
    )
    memory = {
        "student": student,
        "feature_head": head,
        "ema": ema,
        "lr_schedulers": lr_schedulers,
        "optimizers": optimizers,
        "step": 0,
        "skipped": 0,
        "rollout": {},
        "last_validation": {},
        "best": {},
        "beyond": 0,
    }
    memory |= {"scaler": accelerator.scaler} if accelerator.scaler else {}
    if settings.matching_steps:
        critic = copy.deepcopy(student)
        networks.critic_optimizers = make_optimizers(
            settings, critic, rate=settings.critic_learning_rate, is_fused=device.type == "cuda"
        )
        memory |= {"critic": critic, "critic_optimizers": networks.critic_optimizers}
        networks.critic = accelerator.prepare(critic)
    for network in (student, critic) if settings.matching_steps else (student,):
        pace.count(network)
        if settings.compile:  # block by block, in place: names and weights stay as they are
            torch._dynamo.config.optimize_ddp = False  # it would cut each block where gradients go out
            torch._dynamo.config.recompile_limit = 32  # sizes, lengths of text, with gradients and without
            network.compile_repeated_blocks()
    if is_resumed:
        resume(memory, output, device, say)
    step = memory["step"]
    tensorboard = (
        {"purge_step": step + 1} if step else {}
    )  # what was logged after the checkpoint is logged again
    accelerator.init_trackers(
        "wanlite", init_kwargs={"tensorboard": tensorboard, "wandb": {"dir": str(output)}}
    )
    log = MetricsLog(output / "metrics.jsonl", step) if accelerator.is_main_process else None
    began -= log.seconds if log else 0  # what the run took before it was cut short

    def tell(step, grid=None, **record):
        """Log what happened; a disk that is full costs the record, not the run."""
        if not accelerator.is_main_process:
            return
        try:
            log.write(step=step, **record)
            accelerator.log(record, step=step)
            if grid is not None:
                picture = save_grid(output / "samples" / f"step-{step:06d}.png", grid)
                for tracker in accelerator.trackers:
                    log_image(tracker, "teacher above student", picture, step)
        except OSError as error:
            say(f"WARNING: step {step} is not logged: {error}")

    def read(data, numbers):
        batch = data.__getitems__(data.in_order(numbers)[accelerator.process_index :: ranks])
        return batch, words.pack([training[number] for number in batch["prompt"].tolist()])

    def validate(step, phase):
        """Look at the averaged student: figures, a grid, and whether it is the best so far."""
        with averaged(ema, student, settings.use_ema):
            figures_by_steps, figures = validator.validate(student)
            tell(step, grid=validator.draw_grid(student, figures_by_steps), **figures)
            memory["last_validation"] = {"step": step, **figures}
            if phase != "velocity" or not few_steps:
                consider(step, figures, figures_by_steps)
        pace.restart()  # looking and saving are not steps

    def consider(step, figures, figures_by_steps):
        """Keep the student that is lent just now if no guard is against it and none before it was better."""
        score = sum(each[measure] for each in figures_by_steps.values()) / len(figures_by_steps)
        against = [
            f"in {count} step{'s' * (count > 1)}: {reason}"
            for count, each in figures_by_steps.items()
            for reason in find_guard_violations(each)
        ]
        is_best = not memory["best"] or score < memory["best"]["score"]
        memory["beyond"] = memory["beyond"] + 1 if against and not is_best else 0
        if against:
            say(
                f"\nstep {step}: rejected, unlike the teacher {against[0]}"
            )  # all figures are in metrics.jsonl
        elif is_best:
            weights = {name: tensor.detach().cpu().clone() for name, tensor in student.state_dict().items()}
            memory["best"] = {"step": step, "score": score, "figures": figures, "weights": weights}

    def checkpoint(step):
        """Save what the run remembers; a disk that is full costs this checkpoint, not the run and no earlier
        one.
        """
        if accelerator.is_main_process:
            try:
                save_checkpoint(output, memory | {"step": step}, run, settings.checkpoints_total_limit)
            except OSError as error:
                newest = latest_checkpoint(output)[0]
                say(
                    f"\nWARNING: step {step} is NOT saved: {error}\nThe newest checkpoint is {newest}; "
                    f"training goes on."
                )
        accelerator.wait_for_everyone()
        pace.restart()

    def roll_out_student(first):
        """Walk the averaged student's own path, once for the phase that begins at step `first`; returns its
        states by bucket.
        """
        with averaged(ema, student, settings.use_ema):
            if memory["rollout"].get("first") != first:
                memory["rollout"] = {"first": first, "student": broadcast(digest(student))}
            return teacher_data.roll_out(
                student, memory["rollout"]["student"], few, first, is_past=step != first
            )

    if generation_figures:
        tell(step, **generation_figures)
    bar = tqdm(
        total=settings.max_train_steps,
        initial=step,
        desc="distilling",
        unit="step",
        smoothing=0.05,
        disable=not accelerator.is_main_process,
    )
    stop.is_immediate, is_asked = False, False  # from here on a stop waits until nothing is lost by it
    in_a_row, total_loss = 0, torch.zeros((), device=device)
    measure = "frechet_distance" if settings.matching_steps else "image_error"
    try:
        for number, (phase, first, last) in enumerate(phases):
            if step >= last or memory["beyond"] >= PATIENCE:
                continue
            if phase == "matching" and step == first:  # the critic begins as the student that it will watch
                critic.load_state_dict(student.state_dict())
            data = Buckets(
                [states + at if at else states for states, at in zip(trajectories, pictured)]
                if phase == "velocity"
                else [
                    FewStepStates(states, few.levels, own)
                    for states, own in zip(trajectories, roll_out_student(first))
                ]
            )
            batches = SeededBatches(
                data.sizes,
                settings.train_batch_size * ranks,
                settings.seed + 1000 * number,
                (step - first) * micro_batches,
                (last - first) * micro_batches,
            )
            if phase != "matching":
                teacher.unload()  # nobody asks it while the student learns from what is kept
            if step % settings.validation_steps == 0 and memory["last_validation"].get("step") != step:
                validate(step, phase)
            coming = read_ahead(
                partial(read, data), batches, device, PREFETCHED_BATCHES if device.type == "cuda" else 0
            )
            for micro_batch, (batch, text) in enumerate(pace.deal(coming)):
                if is_asked or (ranks == 1 and stop.is_set):
                    raise Stopped
                drawn_by = (
                    settings.seed,
                    step,
                    micro_batch % micro_batches,
                    0,
                )  # the same on all ranks; see FewSteps
                with accelerator.accumulate(wrapped, wrapped_head):
                    with accelerator.autocast():
                        loss, told_apart = STEPS[phase](
                            networks,
                            settings,
                            batch,
                            text,
                            (step - first) / (last - first),
                            torch.Generator().manual_seed(hash(drawn_by) % 2**63),
                        )
                    accelerator.backward(loss)
                    total_loss += loss.detach() / micro_batches
                    if not accelerator.sync_gradients:
                        continue
                    norm = accelerator.clip_grad_norm_(
                        [*wrapped.parameters(), *wrapped_head.parameters()], settings.max_grad_norm
                    )
                    # The one time a step waits for the device: is it sound on every rank, and was any of them
                    # asked to stop?
                    told = torch.stack([total_loss, norm.float(), total_loss.new_tensor(stop.is_set)])
                    mean_loss, norm, asked = accelerator.reduce(told, "mean").tolist()
                    is_asked, is_sound = asked > 0, math.isfinite(mean_loss + norm)
                    total_loss.zero_()
                    for optimizer in optimizers:
                        if is_sound:
                            optimizer.step()
                        optimizer.zero_grad()
                    if (
                        accelerator.scaler is not None
                    ):  # once: accelerate would for each optimizer, and unscale again
                        accelerator.scaler.update()
                for lr_scheduler in lr_schedulers:
                    lr_scheduler.step()
                step += 1
                bar.update()
                if is_sound:
                    ema.step(student.parameters())
                    in_a_row = 0
                else:
                    memory["skipped"], in_a_row = memory["skipped"] + 1, in_a_row + 1
                    if in_a_row == MAX_SKIPPED:
                        raise FloatingPointError(
                            f"{MAX_SKIPPED} steps in a row, up to {step}, had no finite gradient (loss "
                            f"{mean_loss}, norm {norm}). "
                            "Add --overwrite and lower --learning_rate and --muon_learning_rate, or "
                            "--mixed_precision no."
                        )
                if step % LOG_STEPS == 0 or step == last or not is_sound:
                    record = {
                        "loss": mean_loss,
                        "grad_norm": norm,
                        "learning_rate": lr_schedulers[0].get_last_lr()[0],
                        "skipped_steps": memory["skipped"],
                        **{name: value.item() for name, value in told_apart.items()},
                    }
                    record |= (figures := pace.figures())
                    bar.set_postfix(phase=phase, loss=f"{mean_loss:.3f}", **in_brief(figures), refresh=False)
                    tell(step, seconds=round(time.time() - began, 1), **record)
                if step % settings.validation_steps == 0 and step < settings.max_train_steps:
                    validate(step, phase)
                if step % settings.checkpointing_steps == 0 or step == settings.max_train_steps:
                    checkpoint(step)
                if memory["beyond"] >= PATIENCE:
                    say(
                        f"\nended at step {step}: {PATIENCE} validations in a row were rejected and no "
                        f"closer to the teacher"
                    )
                    break
    except Stopped:
        checkpoint(step)
        accelerator.end_training()
        say(f"\nstopped at step {step} of {settings.max_train_steps}")
        raise
    stop.is_immediate = True  # the last checkpoint holds all that is needed below
    bar.close()

    # What is kept: the averaged student that validation found best, what inference needs beside it, and how
    # good it is.
    stop.check()
    if memory["last_validation"].get("step") != step:
        validate(step, phases[-1][0])
    if settings.use_ema:
        ema.copy_to(student.parameters())
    figures, chosen = (
        memory["last_validation"],
        {"step": step, "why": "the last step, for every validation was rejected"},
    )
    if is_close := bool(memory["best"]):
        student.load_state_dict(memory["best"]["weights"])
        figures, chosen = (
            memory["best"]["figures"],
            {
                "step": memory["best"]["step"],
                measure: memory["best"]["score"],
                "why": f"the lowest {measure} of the validations that were not rejected",
            },
        )
    if accelerator.is_main_process:
        student.save_pretrained(output)
        save_components(output, components_folder, own_scheduler)
    results = {name: value for name, value in figures.items() if name != "step"}
    if (
        teacher.residency == "sharded" or accelerator.is_main_process
    ):  # of a teacher in shares all have to ask
        results |= validator.judge(student)
    if accelerator.is_main_process:
        ending = verdict(chosen["step"], is_close)
        write_json(
            output / "run.json",
            run
            | {
                "finished": True,
                "steps": step,
                "minutes": (time.time() - began) / 60,
                "skipped_steps": memory["skipped"],
                "chosen": chosen,
                "verdict": ending,
                "results": results,
            },
        )
        write_model_card(output, settings, few_steps, results, drawing_command(settings.output_dir))
        conclude(settings, output, results, ending, is_close, time.time() - began, say)
    accelerator.end_training()


def save_start(output, settings, student, components_folder, run):
    """Save a projected student that nothing was trained of: it draws by the teacher's schedule, as a student
    of stage 1 does.
    """
    clear(output)
    write_json(
        output / "run.json", run | {"projected_only": True, "schedule": describe_schedule(settings, [], [])}
    )
    student.save_pretrained(output)
    save_components(output, components_folder, make_scheduler(settings.flow_shift))
    write_model_card(output, settings, [], {}, drawing_command(settings.output_dir))
    print(f"saved to {output}, projected and not trained\nnext: {drawing_command(settings.output_dir)}")


def resume(memory, output, device, say):
    """Give everything in `memory` the state of the newest checkpoint that verifies; 0 steps where there is
    none yet.
    """
    path, skipped = latest_checkpoint(output)
    for reason in skipped:
        say(reason)
    if path is None:
        if skipped:
            raise OSError(
                f"{output}: no checkpoint verifies, so nothing can be resumed. Add --overwrite to start "
                f"again."
            )
        return
    restore(memory, load_checkpoint(path))
    memory["ema"].to(device)
    say(f"resumed at step {memory['step']} from {path}")


def digest(student):
    """Return the sha256 of a student's weights."""
    found = hashlib.sha256()
    for tensor in student.state_dict().values():
        found.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())
    return found.hexdigest()


@contextmanager
def averaged(ema, student, use_ema):
    """Lend the student its averaged weights."""
    if use_ema:
        ema.store(student.parameters())
        ema.copy_to(student.parameters())
    try:
        yield
    finally:
        if use_ema:
            ema.restore(student.parameters())


# ---- main --------------------------------------------------------------------------------------------------


def is_dry(word):
    """Whether a word of the command line is --dry_run, or what argparse takes for it."""
    return len(word) > len("--d") and "--dry_run".startswith(word)


def resuming_command(settings):
    """Return the command that goes on with this run; flags that would start it again are taken back once it
    is in the folder.
    """
    words, again = sys.argv[1:], {"overwrite": False, "resume_from_checkpoint": "latest"}
    with suppress(OSError, ValueError):
        if is_cut_short(replace(settings, **again)):
            words += ["--no-overwrite"] * settings.overwrite
            words += ["--resume_from_checkpoint", "latest"] * (settings.resume_from_checkpoint == "none")
    return command(Path(__file__).name, *words)


def main(settings, is_resumed):
    """Train in --output_dir, or say what that would need; returns the exit code."""
    try:
        if settings.dry_run:
            return (
                0 if not is_first() else plan(settings, [word for word in sys.argv[1:] if not is_dry(word)])
            )
        train(settings, is_resumed, StopSignal(is_launched=is_launched()))
    except (OSError, ValueError, FloatingPointError) as error:
        defer_to_rank_zero()
        print(f"train_distillation.py: {error}", file=sys.stderr)
        return 2
    except torch.OutOfMemoryError as error:
        print(
            f"train_distillation.py: {str(error).splitlines()[0]} What the teacher has said is kept. See "
            f"that nothing else is on "
            "the device, or add --overwrite and a lower --train_batch_size with more "
            "--gradient_accumulation_steps, "
            "--gradient_checkpointing, or --teacher_residency disk.",
            file=sys.stderr,
        )
        return 2
    except RuntimeError as error:
        if not (is_launched() and is_peer_failure(error)):
            raise
        print(
            f"train_distillation.py: another process of this run is gone ({str(error).splitlines()[0]}). "
            f"What ended it was said "
            "by itself or its machine; the same command goes on from the newest checkpoint.",
            file=sys.stderr,
        )
        return 2
    except Stopped:
        if is_first():
            print(f"stopped; resume with: {resuming_command(settings)}", file=sys.stderr)
        return STOPPED
    return 0


if __name__ == "__main__":
    gc.freeze()  # and are not looked through again
    gc.enable()
    sys.exit(main(SETTINGS, IS_RESUMED))
