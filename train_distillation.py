"""Project a Wan teacher's weights into a small text-to-image student, distil it from prompts alone, save it.

    python train_distillation.py                                                     # the tiny teacher, minutes on a laptop
    python train_distillation.py --teacher ./Wan2.2-T2V-A14B --prompts prompts.txt   # one GPU box
    accelerate launch train_distillation.py --teacher ... --prompts ...              # several GPUs

Order: settings -> WanLiteStudent -> build -> one step -> looking at it -> the loop. The run goes to --output_dir; run the same
command after a stop and it goes on where it was.
"""

import json
import os
import shlex
import sys
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

from wanlite.images import choose_images, list_images, read_picture
from wanlite.launch import check_launch, give_way, is_first, is_launched, launched_precision, local_processes
from wanlite.official import (
    autoencoder_config,
    check_parts,
    convert_parts,
    find_parts,
    has_two_experts,
    is_converted,
    num_bytes,
    pixels_per_token,
)
from wanlite.preflight import (
    PARTS,
    bound_pictures,
    bucket_sizes,
    check_all,
    check_batch,
    check_compiler,
    check_numbers,
    check_student,
    complete_resolution,
    complete_steps,
    count_looks,
    count_passes,
    parts_of,
)
from wanlite.prompts import read_prompts, varied_prompts
from wanlite.run_folder import (
    MetricsLog,
    check_output_folder,
    check_resumable,
    clear,
    fitted_before,
    picture_size,
    read_run,
    save_parts,
    write_model_card,
)
from wanlite.settings import make_parser, setting
from wanlite.stopping import Stopped, StopSignal
from wanlite.trackers import check_tracker, log_picture
from wanlite.whole_files import hold, in_turn, new_folder, not_finite, why_broken, write_json

TINY_TEACHER = Path(__file__).resolve().parent / "tiny_teacher"
REAL_TEACHERS = ("Wan2.2-T2V-A14B", "Wan2.2-T2V-A14B-Diffusers")     # looked for where the command is typed
OFFICIAL_SHIFTS = {True: 12.0, False: 5.0}                           # of two experts and of one, where no scheduler says it
DEFAULT_PROMPTS = 4000    # of the tiny world or of a grammar, where no prompts file is named
CALIBRATION_TOKENS = 16384   # image tokens on which the projected weights are refitted
GRID_FIGURES = {"variety": "variety", "colour": "saturation", "drift": "channel_drift"}      # told beside the rows of a grid
LARGE = 1024              # width from which on a teacher is held against the machine that it runs on
BATCH = 128               # states in a batch on each device, where --train_batch_size is left open
FILLED = 0.9              # of the free memory may be filled with them, for what they take is told a little low
LOG_STEPS = 10
STOPPED = 3               # exit code of a run that was asked to stop and can be resumed
MOST_BEYOND = 2           # validations in a row with a guard against the student, after which training ends and the best is saved
MOST_SKIPPED = 20         # steps in a row without a finite gradient, after which a run ends; float16 needs some to find its scale
FREE = ("teacher", "teacher_residency", "output_dir", "cache_dir", "dry_run", "overwrite", "resume_from_checkpoint", "project_only",
        "checkpointing_steps", "report_to", "checkpoints_total_limit", "logging_dir")    # decide no weight
FITTED = ("mixed_precision", "train_batch_size", "gradient_accumulation_steps")          # are chosen for a machine where left open


# ---- settings --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Settings:
    teacher: str | None = setting(None, f"Wan folder, diffusers, official or ComfyUI layout; None = ./{REAL_TEACHERS[0]} "
                                  "if there is one, else the tiny teacher", aliases=("--teacher_checkpoint_path", "--teacher_path"))
    prompts: str | None = setting(None, "text file, one prompt a line, or .jsonl, .csv, .parquet with a column prompt, text or "
                                  "caption; None = prompts of a grammar, for the tiny teacher captions of its world")
    images: str | None = setting(None, "captioned images that stage 1 learns from too: a folder with a .txt beside each or "
                                 "metadata.jsonl or .csv, .parquet files, a folder saved by datasets, or webdataset's .tar files")
    num_images: int | None = setting(None, "of them, the first so many that can be used; None = all")
    output_dir: str = setting("./outputs/wan_t2i", "where everything is written")
    cache_dir: str | None = setting(None, "projected starts and trajectories, which runs may share; None = cache/ in --output_dir")
    dry_run: bool = setting(False, "say what a run will do and need, and stop; nothing is written")
    overwrite: bool = setting(False, "replace a finished run in --output_dir")
    resume_from_checkpoint: str | None = setting("latest", "'latest', or 'none' to start again where a run was cut short")

    hidden_size: int | None = setting(None, "student width; None = 1024, for a small teacher half its width")
    depth: int | None = setting(None, "student blocks; None = 16, for a small teacher its depth")
    num_heads: int | None = setting(None, "student heads; None = heads of half the teacher's size")
    ffn_dim: int | None = setting(None, "width inside the feed-forward; None = 4 * hidden_size")
    projection: str = setting("calibrated", "how the student starts: from the teacher's weights, these refitted to what the "
                              "teacher computes, or random as a control", choices=("weights", "calibrated", "none"))
    expert: str = setting("high", "which of two experts is projected; span = for each block the one that keeps more, from "
                          "weights only", choices=("low", "high", "span"))
    project_only: bool = setting(False, "save the projected start in --output_dir and stop; later runs there reuse it")
    student: str | None = setting(None, "a saved student to go on from, instead of projecting")

    guidance_scale: float = setting(4.0, "guidance of the high-noise expert, or of the only one; baked into the student")
    guidance_scale_2: float = setting(3.0, "guidance of the low-noise expert; baked into the student")
    negative_prompt: str = setting("", "what guidance steers away from")
    flow_shift: float | None = setting(None, "shift of the noise schedule; None = what the teacher's scheduler says")
    resolution: list[int] | int | None = setting(None, "pixels, one number for squares, or WIDTH HEIGHT; divisible by 16, for "
                                                 "TI2V-5B by 32; None = the teacher's own, else 512")
    aspect_ratios: list[str] | None = setting(None, "WIDTH:HEIGHT of what is trained on, as 1:1 3:2 2:3, all of about the area of "
                                              "--resolution, which validations keep; None = that of --resolution")
    teacher_residency: str = setting("auto", "where its experts are while they are asked: both on the device; one there, the other "
                                     "in CPU memory; sharded over a machine's GPUs; streamed from CPU memory block by block; "
                                     "read from disk at each pass; auto = the first of these that fits",
                                     choices=("auto", "both", "one", "sharded", "streamed", "disk"))
    teacher_fp8: bool = setting(False, "keep the experts' matrices in float8, in half the memory")
    teacher_steps: int = setting(20, "guided steps of a teacher trajectory")
    num_trajectories: int | None = setting(None, "teacher pictures to learn from; None = one a prompt")

    num_held_out: int = setting(400, "prompts that are never trained on; at most a twentieth of a prompts file")

    train_batch_size: int | None = setting(None, "states in a micro-batch, on each device; None = 128, of a large teacher's "
                                           "student as many of them as fit")
    max_train_steps: int = setting(1400, "optimizer steps in all; what --segment_steps and --matching_steps leave is stage 1")
    segment_steps: int | None = setting(None, "stage 2a: of them, steps towards the teacher's pictures; None = 5 of 7")
    matching_steps: int = setting(0, "stage 2b: of them, the last, steps of distribution matching with a critic")
    few_steps: list[int] = setting((1, 2, 4), "numbers of steps that stage 2 trains for; divisors of --teacher_steps")
    own_path_pictures: int | None = setting(None, "states on the student's own path, walked on by the teacher, twice in stage 2a; "
                                            "None = 512, of a large teacher at most one for eight trajectories")
    gradient_accumulation_steps: int | None = setting(None, "micro-batches in a step; None = as many as make up 128 states where "
                                                      "--train_batch_size is open, else 1")
    learning_rate: float = setting(3e-3, "peak of AdamW's learning rate")
    lr_scheduler: str = setting("cosine", "as in diffusers", choices=("cosine", "linear", "constant_with_warmup"))
    lr_warmup_steps: int = setting(100, "steps until the peak")
    muon_learning_rate: float = setting(0.09, "peak of Muon's, for the matrices of the blocks; 0 = AdamW for all")
    adam_beta2: float = setting(0.99, "decay of AdamW's second moment")
    adam_weight_decay: float = setting(0.01, "decoupled weight decay")
    max_grad_norm: float = setting(1.0, "gradients are clipped to this norm")
    feature_weight: float = setting(3.0, "weight of the feature loss at the start of stage 1, falling to 0 at its end")
    feature_directions: int | None = setting(None, "directions in which token states are compared, those in which the teacher's "
                                             "vary most; None = a quarter of the student's width")
    variety_gain: float = setting(0.3, "stage 2: how much farther apart than the teacher's the pictures of a prompt are aimed at, "
                                  "as they come out nearer to each other; 0 = regression alone")
    anchor_weight: float = setting(1.0, "stage 2b: weight of stage 2a's loss beside distribution matching")
    critic_learning_rate: float = setting(5e-4, "stage 2b: the critic's; its Muon has the student's ratio to it")
    critic_updates: int = setting(3, "stage 2b: updates of the critic for one of the student")
    critic_pull: float = setting(0.03, "stage 2b: how far the critic moves to the student after each of its updates")
    use_ema: bool = setting(True, "save an exponential moving average of the weights")
    ema_decay: float = setting(0.998, "its decay a step")
    mixed_precision: str | None = setting(None, "as in accelerate; master weights and losses stay in float32; None = what "
                                          "accelerate launch says, else bf16 for a large teacher on a GPU, else no",
                                          choices=("no", "bf16", "fp16"))
    gradient_checkpointing: bool = setting(False, "recompute blocks in the backward pass to save memory")
    compile: bool = setting(False, "compile the student's blocks: minutes at first, faster steps then; needs a C++ compiler")
    allow_tf32: bool = setting(False, "on CUDA, multiply float32 matrices with TF32's shorter mantissas while training")

    checkpointing_steps: int = setting(500, "steps between resumable checkpoints")
    checkpoints_total_limit: int = setting(2, "newest checkpoints to keep, at least 2")
    validation_steps: int = setting(350, "steps between validations: figures, a grid, and a candidate to be saved")
    validation_walks: int | None = setting(None, "the most teacher pictures of a kind that validations are held against; None = "
                                           "64, of a large teacher one for twenty trajectories, at least 4")
    reference_steps: int | None = setting(None, "guided steps of the teacher in the grids; None = twice --teacher_steps")
    validation_prompts: list[str] | None = setting(None, "prompts of the grids; None = eight held-out ones")
    num_inference_steps: int = setting(4, "steps in which the student draws; goes to run.json as its default")
    report_to: str = setting("tensorboard", "tracker, as in accelerate: tensorboard, wandb, ...; 'none' for metrics.jsonl alone")
    logging_dir: str = setting("logs", "tracker files, inside --output_dir")
    seed: int = setting(0, "seed of everything random")


def read_settings():
    """Read the command line and check everything that needs no torch; ends with one line and exit code 2 where it is wrong.

    Returns the settings with every None filled that a folder or file decides, and whether a run cut short goes on.
    """
    parser = make_parser(Settings, __doc__)
    settings = Settings(**vars(parser.parse_args()))
    try:
        settings = complete(settings)
        decisive = {name: value for name, value in asdict(settings).items() if name not in FREE}
        state = check_output_folder(settings.output_dir, decisive, settings.overwrite or settings.project_only,
                                    settings.resume_from_checkpoint not in (None, "none"))
    except (OSError, ValueError) as error:
        parser.error(str(error))
    if not settings.dry_run:
        Path(settings.output_dir).mkdir(parents=True, exist_ok=True)
    return settings, state == "resume"


def complete(settings):
    """Check paths, sizes and numbers, and fill in what the teacher's folder says."""
    here = (Path(name) for name in REAL_TEACHERS if Path(name).is_dir())
    teacher = Path(settings.teacher or next(here, TINY_TEACHER)).expanduser().absolute()
    if not teacher.is_dir():
        raise OSError(f"--teacher {settings.teacher}: no such folder. Expected a Wan checkpoint in the official, diffusers or "
                      "ComfyUI layout; leave the flag out for the tiny teacher.")
    record = read_record(teacher)
    settings = replace(settings, mixed_precision=launched_precision(settings.mixed_precision))
    checks = [partial(find_parts, teacher), partial(_complete_resolution, teacher, settings), partial(check_numbers, settings),
              partial(check_launch, settings), partial(complete_steps, settings), partial(check_tracker, settings.report_to)]
    if settings.compile:
        checks.append(check_compiler)
    if settings.prompts is not None:
        checks.insert(0, partial(read_prompts, settings.prompts))
    if settings.images is not None:
        checks.insert(0, partial(list_images, settings.images))
    if settings.dry_run:                                     # takes the time of an import, and no run waits for it
        checks.append(partial(_check_headers, teacher))
    check_all(checks, together=settings.dry_run)
    few_steps, segment_steps = complete_steps(settings)
    scheduler = teacher / "scheduler" / "scheduler_config.json"
    official_shift = OFFICIAL_SHIFTS[has_two_experts(teacher)]
    shift = settings.flow_shift or record.get("shift") or (
        json.loads(scheduler.read_text())["flow_shift"] if scheduler.is_file() else official_shift)
    settings = replace(settings, teacher=str(teacher), resolution=_complete_resolution(teacher, settings), flow_shift=float(shift),
                       few_steps=few_steps, segment_steps=segment_steps,
                       reference_steps=settings.reference_steps or 2 * settings.teacher_steps,
                       cache_dir=settings.cache_dir or str(Path(settings.output_dir) / "cache"))
    if settings.student is not None:
        student = Path(settings.student).expanduser().absolute()
        check_student(read_run(student), settings, student)
        settings = replace(settings, student=str(student))
    return settings


def _check_headers(teacher):
    from wanlite.teacher import open_teacher_files

    open_teacher_files(teacher)


def _complete_resolution(teacher, settings):
    resolution = read_record(teacher).get("resolution", 512) if settings.resolution is None else settings.resolution
    resolution, unit = complete_resolution(resolution, pixels_per_token(teacher)), pixels_per_token(teacher)
    bucket_sizes(picture_size(resolution), settings.aspect_ratios, unit)
    return resolution


def read_record(teacher):
    """Return the training record of a tiny teacher, or an empty dict for any other teacher."""
    path = Path(teacher) / "training.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


if __name__ == "__main__":  # arguments and paths are answered before torch is imported, which takes seconds
    os.environ.setdefault("GOMP_SPINCOUNT", "5000")    # threads that spin long at barriers stall beside any other busy program
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_MININTERVAL", "10")    # seconds between two lines of progress in a log
    SETTINGS, IS_RESUMED = read_settings()

import copy  # noqa: E402
import hashlib  # noqa: E402
import inspect  # noqa: E402
import math  # noqa: E402
import time  # noqa: E402
from collections.abc import Callable, Mapping  # noqa: E402
from contextlib import contextmanager  # noqa: E402
from itertools import chain  # noqa: E402
from typing import Any  # noqa: E402

import numpy as np  # noqa: E402
import torch  # noqa: E402
from accelerate import Accelerator, init_empty_weights  # noqa: E402
from accelerate.utils import ProjectConfiguration, set_seed  # noqa: E402
from diffusers.configuration_utils import ConfigMixin  # noqa: E402
from diffusers.loaders import FromOriginalModelMixin, PeftAdapterMixin  # noqa: E402
from diffusers.models.attention import AttentionMixin  # noqa: E402
from diffusers.models.cache_utils import CacheMixin  # noqa: E402
from diffusers.models.modeling_outputs import Transformer2DModelOutput  # noqa: E402
from diffusers.models.modeling_utils import ModelMixin  # noqa: E402
from diffusers.models.normalization import FP32LayerNorm  # noqa: E402
from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed, WanTimeTextImageEmbedding  # noqa: E402
from diffusers.training_utils import EMAModel  # noqa: E402
from diffusers.utils.peft_utils import apply_lora_scale  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from torch import nn  # noqa: E402
from tqdm import tqdm  # noqa: E402

from wanlite import shapes  # noqa: E402
from wanlite.announcements import announce, conclude, versions  # noqa: E402
from wanlite.autoencoder import (  # noqa: E402
    DECODED_AT_ONCE,
    decode_latents,
    encode_images,
    load_autoencoder,
    make_autoencoder,
    to_pictures,
    to_pixels,
)
from wanlite.cache import cache_folder, fingerprint  # noqa: E402
from wanlite.calibration import PASSES as CALIBRATING_PASSES  # noqa: E402
from wanlite.calibration import calibrate, choose_channels, make_frames  # noqa: E402
from wanlite.checkpoints import latest_checkpoint, load_checkpoint, restore, save_checkpoint  # noqa: E402
from wanlite.data import (  # noqa: E402
    SHARD_SIZE,
    Buckets,
    SeededBatches,
    Segments,
    Walker,
    deal_out,
    encode_once,
    kept_once,
)
from wanlite.devices import as_device, as_dtype, free_memory, has_gpu  # noqa: E402
from wanlite.flow import FewSteps, make_scheduler, sample, seeded_noise  # noqa: E402
from wanlite.grids import save_grid  # noqa: E402
from wanlite.measure import beyond_guards, compare, frechet_distance, likeness  # noqa: E402
from wanlite.network import TEXT_LENGTH, OneFrameBlock, TextTokens, one_frame_velocity, pack_text  # noqa: E402
from wanlite.optimizers import make_optimizers, make_rates  # noqa: E402
from wanlite.pace import Pace, in_brief  # noqa: E402
from wanlite.plan import (  # noqa: E402
    at_depth,
    decoding_peak,
    estimate,
    largest_batch,
    matrix_rate,
    pass_peak,
    start_peaks,
    teacher_bytes,
    tell,
    text_bytes,
    trajectory_bytes,
    walk_bytes,
)
from wanlite.plan import training_peak as simulate_training  # noqa: E402
from wanlite.projection import check_shape as check_cut  # noqa: E402
from wanlite.projection import choose_experts, project, project_into, student_shape  # noqa: E402
from wanlite.ranks import agreed, check_devices, is_lost, patience, refuse_together  # noqa: E402
from wanlite.reading import AHEAD, read_ahead  # noqa: E402
from wanlite.steps import MATCHED, STEPS, Networks, velocity_in_parts  # noqa: E402
from wanlite.student_files import (  # noqa: E402
    all_tensor_shapes,
    check_hashes,
    check_shape,
    check_weights,
    open_student,
    student_arguments,
    student_folder,
)
from wanlite.student_saving import check_savable, save_student  # noqa: E402
from wanlite.teacher import (  # noqa: E402
    RESIDENCIES,
    TOKENS_AT_ONCE,
    Teacher,
    check_experts,
    choose_residency,
    open_teacher_files,
    sampled_digest,
)
from wanlite.text import lazy_encoder  # noqa: E402

# ---- the model ---------------------------------------------------------------------------------------------------------

@dataclass
class StudentOutput(Transformer2DModelOutput):
    features: list | None = None


class WanLiteStudent(ModelMixin, ConfigMixin, PeftAdapterMixin, FromOriginalModelMixin, CacheMixin, AttentionMixin):
    """A small Wan transformer that draws single frames, in diffusers' parts and under diffusers' key names.

    `WanLiteStudent(hidden_size=64, depth=4, num_heads=2)` or `WanLiteStudent({"hidden_size": 64, ...})` builds a random one;
    `teacher_checkpoint_path=DIR` projects that teacher's weights into it, once, and is no part of the config.
    A saved student also loads as a stock WanTransformer3DModel: config.json carries the Wan names beside ours.
    """

    _supports_gradient_checkpointing = True
    _skip_layerwise_casting_patterns = ["patch_embedding", "condition_embedder", "norm"]
    _no_split_modules = ["OneFrameBlock"]
    _keep_in_fp32_modules = ["rope", "time_embedder", "scale_shift_table", "norm1", "norm2", "norm3"]
    _repeated_blocks = ["OneFrameBlock"]
    _left_to_stock = ("max_memory", "offload_folder", "offload_state_dict", "use_flashpack")     # a pipeline says no to them
    ignore_for_config = ["teacher_checkpoint_path", "projection", "expert"]

    def __init__(
        self,
        hidden_size: int | Mapping = 1024,       # or a whole config
        depth: int = 16,
        num_heads: int = 16,
        ffn_dim: int | None = None,              # None: 4 * hidden_size
        num_channels: int = 16,                  # of the latents
        text_dim: int = 4096,
        freq_dim: int = 256,
        patch_size: tuple[int, int, int] = (1, 2, 2),
        cross_attn_norm: bool = True,
        qk_norm: str = "rms_norm_across_heads",
        eps: float = 1e-6,
        rope_max_seq_len: int = 1024,
        teacher_checkpoint_path: str | None = None,
        projection: str = "weights",             # "weights" or "none"
        expert: str = "low",                     # which of two experts is projected
    ):
        super().__init__()
        if isinstance(hidden_size, Mapping):
            config = {name: value for name, value in hidden_size.items() if not name.startswith("_")}
            return self.__init__(**{"teacher_checkpoint_path": teacher_checkpoint_path, "projection": projection,
                                    "expert": expert, **student_arguments(config, _defaults())})
        ffn_dim = ffn_dim or 4 * hidden_size
        check_shape(patch_size, eps, cross_attn_norm, qk_norm, hidden_size=hidden_size, depth=depth, num_heads=num_heads,
                    ffn_dim=ffn_dim, num_channels=num_channels, text_dim=text_dim, freq_dim=freq_dim,
                    rope_max_seq_len=rope_max_seq_len)
        head_dim, patch_size = hidden_size // num_heads, (1, patch_size[1], patch_size[2])
        self.register_to_config(
            hidden_size=hidden_size, depth=depth, num_heads=num_heads, ffn_dim=ffn_dim, num_channels=num_channels,
            text_dim=text_dim, freq_dim=freq_dim, patch_size=patch_size, cross_attn_norm=cross_attn_norm,
            qk_norm=qk_norm, eps=eps, rope_max_seq_len=rope_max_seq_len,
            num_attention_heads=num_heads, attention_head_dim=head_dim, num_layers=depth, in_channels=num_channels,
            out_channels=num_channels)

        self.rope = WanRotaryPosEmbed(head_dim, patch_size, rope_max_seq_len)
        self.patch_embedding = nn.Conv3d(num_channels, hidden_size, kernel_size=patch_size, stride=patch_size)
        self.condition_embedder = WanTimeTextImageEmbedding(hidden_size, freq_dim, 6 * hidden_size, text_dim)
        self.blocks = nn.ModuleList(OneFrameBlock(hidden_size, ffn_dim, num_heads, qk_norm, cross_attn_norm, eps)
                                    for _ in range(depth))
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
        hidden_states: torch.Tensor,                             # (B, C, H, W), or (B, C, 1, H, W) as a pipeline gives
        timestep: torch.Tensor,                                  # (B,) in 0..1000, or (B, N) with equal rows
        encoder_hidden_states: torch.Tensor | TextTokens,        # (B, L, T)
        encoder_hidden_states_image: torch.Tensor | None = None,
        return_dict: bool = True,
        attention_kwargs: dict | None = None,
        text_logit_bias: torch.Tensor | None = None,             # (B, L); None: every token counts once
        feature_blocks: tuple[int, ...] = (),
    ) -> StudentOutput | tuple:
        """Return the velocity in the shape of `hidden_states`, and the token states after `feature_blocks` where asked."""
        is_video = hidden_states.ndim == 5
        if is_video and hidden_states.shape[2] != 1:
            raise ValueError(f"latents have {hidden_states.shape[2]} frames; the student draws single frames: num_frames=1.")
        if encoder_hidden_states_image is not None:
            raise ValueError("encoder_hidden_states_image was given; the student is a text-to-image model without it.")
        latents = hidden_states.squeeze(2) if is_video else hidden_states
        if isinstance(encoder_hidden_states, TextTokens):
            encoder_hidden_states, text_logit_bias = encoder_hidden_states
        if timestep.ndim == 2:
            if (timestep != timestep[:, :1]).any():
                raise ValueError("timesteps differ between the tokens of a picture; the student takes one a picture: (B,).")
            timestep = timestep[:, 0]
        velocity, features = one_frame_velocity(self, latents, timestep, encoder_hidden_states, text_logit_bias,
                                                feature_blocks)
        velocity = velocity.unsqueeze(2) if is_video else velocity
        if return_dict:
            return StudentOutput(sample=velocity, features=features or None)
        return (velocity, features) if feature_blocks else (velocity,)

    def save_pretrained(self, save_directory: str | os.PathLike, is_main_process: bool | None = None,
                        save_function: Callable | None = None, safe_serialization: bool = True, variant: str | None = None,
                        max_shard_size: int | str = "10GB", push_to_hub: bool = False, **kwargs) -> None:
        """Save config and weights so that a reader finds the student that was there or this one, never a mixture.

        Every rank may call it; where `is_main_process` is None, rank 0 writes. `save_function` is accepted and not used.
        `kwargs` are those of push_to_hub. Raises ValueError for weights that would not load again: not finite, on no device, or
        with an adapter among them.
        """
        if kwargs and not push_to_hub:
            raise TypeError(f"WanLiteStudent.save_pretrained does not take {', '.join(sorted(kwargs))} without push_to_hub.")
        if not safe_serialization:
            raise ValueError("safe_serialization=False asks for a pickle; students are saved as safetensors only. Leave it out.")
        if is_main_process is None:
            is_main_process = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
        tensors = self.state_dict()                              # of a sharded student every rank has to take part
        if not is_main_process:
            return
        check_savable(tensors, all_tensor_shapes(self.config), save_directory)
        save_student(save_directory, self.to_json_string(), tensors, variant, max_shard_size)
        if push_to_hub:
            self.push_to_hub(kwargs.pop("repo_id", Path(save_directory).name), variant=variant, **kwargs)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike, *, subfolder: str | None = None, variant: str | None = None,
        dtype: torch.dtype | str | None = None, torch_dtype: torch.dtype | str | None = None,
        device: torch.device | str | int | None = None, device_map: Mapping | torch.device | str | int | None = None,
        low_cpu_mem_usage: bool = True, use_safetensors: bool | None = True, disable_mmap: bool = False,
        output_loading_info: bool = False, local_files_only: bool = False, revision: str | None = None,
        token: str | bool | None = None, cache_dir: str | os.PathLike | None = None, force_download: bool = False,
        sha256: str | Mapping[str, str] | None = None, **unknown: Any,
    ) -> Any:                                            # a WanLiteStudent; with `output_loading_info` a pair, as in diffusers
        """Load a saved student from a folder or the hub: exactly its weights, on the CPU unless told otherwise, in eval mode.

        Never projects and needs no teacher. `dtype` (or `torch_dtype`, a torch.dtype or its name) leaves the modules that
        Wan keeps in float32 there; None keeps every dtype as saved. `sha256` pins the weights to a digest. Nothing is built
        before header and config are known to agree. Raises OSError for files that are missing or broken and ValueError for
        content that is not this student's. Memory is used once whatever `low_cpu_mem_usage` says.
        """
        if unknown := {name: value for name, value in unknown.items() if value or name not in cls._left_to_stock}:
            accepted = ", ".join(list(inspect.signature(cls.from_pretrained).parameters)[1:-1])
            raise TypeError(f"WanLiteStudent.from_pretrained does not take {', '.join(sorted(unknown))}; it takes {accepted}. "
                            "Loading never projects a teacher.")
        if use_safetensors is False:
            raise ValueError("use_safetensors=False asks for a pickle, and pickles are never opened. Leave it out.")
        dtype, device = as_dtype(torch_dtype if dtype is None else dtype), as_device(device_map if device is None else device)
        folder = student_folder(pretrained_model_name_or_path, subfolder, local_files_only=local_files_only, revision=revision,
                                token=token, cache_dir=cache_dir, force_download=force_download)
        with open_student(folder, variant) as (config, files):
            try:
                arguments = student_arguments(config, _defaults())
            except ValueError as error:
                raise ValueError(f"{folder / 'config.json'}: {error}") from None
            check_weights(files, arguments)
            check_hashes(files, sha256)
            tensors = {}
            for name, tensor in chain.from_iterable(file.tensors(is_mapped=not disable_mmap) for file in files):
                tensors[name] = tensor.to(device, None if _stays_float32(name) else dtype)
            for name in not_finite(tensors):
                path = next(file.path for file in files if name in file.entries)
                raise ValueError(f"{path}: {name} holds NaN or infinity as {tensors[name].dtype}. Take an earlier save, or a dtype "
                                 "of more range.")
        # Parameters are without memory, rotary tables are real, and the user's random numbers are not used up.
        with init_empty_weights(), torch.random.fork_rng(devices=[]):
            student = cls(**arguments)
        student.load_state_dict(tensors, strict=True, assign=True)
        student.register_to_config(_name_or_path=str(pretrained_model_name_or_path))
        student.rope.to(device)                          # all else is there
        student.eval()
        nothing: dict[str, list] = {"missing_keys": [], "unexpected_keys": [], "mismatched_keys": [], "error_msgs": []}
        return (student, nothing) if output_loading_info else student


def _defaults():
    """Return {name: default} of the arguments that make up a config."""
    parameters = inspect.signature(WanLiteStudent.__init__).parameters.values()
    return {parameter.name: parameter.default for parameter in parameters
            if parameter.name not in ("self", *WanLiteStudent.ignore_for_config)}


def _stays_float32(name):
    return any(part in WanLiteStudent._keep_in_fp32_modules for part in name.split("."))


# ---- build: what a run has before its first step -------------------------------------------------------------------------

def choose_prompts(settings, say=None):
    """Return training prompts and held-out prompts; no trajectory of training starts from a held-out one."""
    count = settings.num_trajectories or DEFAULT_PROMPTS
    if settings.prompts is None and read_record(settings.teacher).get("world") == "wanlite.shapes":
        one, two = (shapes.captions(settings.seed + 1, settings.num_held_out // 2, held_out=True, num_objects=n) for n in (1, 2))
        return shapes.captions(settings.seed, count), [prompt for pair in zip(one, two) for prompt in pair]
    prompts = varied_prompts(settings.seed, count) if settings.prompts is None else (
        list(dict.fromkeys(read_prompts(settings.prompts, say))))
    num_held_out = min(settings.num_held_out, max(1, len(prompts) // 20))
    return prompts[:-num_held_out] or prompts, prompts[-num_held_out:]


def choose_data(settings, say, is_main_process=True):
    """Return training prompts, held-out prompts, and captioned images, whose captions are among the former.

    What was found of images is kept in the cache, by their contents: only new ones are decoded. A dry run keeps nothing.
    """
    training, held_out = choose_prompts(settings, say)
    if settings.images is None:
        return training, held_out, []
    record = Path(settings.cache_dir) / "images.json"
    seen = json.loads(record.read_text(encoding="utf-8")) if record.is_file() else {}
    known = len(seen)
    images = choose_images(settings.images, picture_sizes(settings)[1:], settings.num_images, held_out, say, seen,
                           is_main_process)
    if len(seen) > known and is_main_process and not settings.dry_run:
        record.parent.mkdir(parents=True, exist_ok=True)
        write_json(record, seen)
    return list(dict.fromkeys([*training, *(image.caption for image in images)])), held_out, images


def choose_shape(settings, files):
    """Return the student's shape: that of --student, or what the flags and the teacher's say.

    Raises ValueError for a student of another teacher, and for a shape that cannot be projected.
    """
    if settings.student is not None:
        if read_run(settings.student)["teacher"] != files.fingerprint:
            raise ValueError(f"--student {settings.student}: was distilled from another teacher than {settings.teacher}. Use the "
                             "same, or leave --student out.")
        return read_run(settings.student)["student"]
    if (settings.feature_directions or 1) > files.width:
        raise ValueError(f"--feature_directions {settings.feature_directions} is more than the {files.width} of the teacher's "
                         "token states. Lower it, or leave it out.")
    shape = student_shape(files.config, settings.hidden_size, settings.depth, settings.num_heads, settings.ffn_dim)
    if settings.projection != "none":
        check_cut(files.config, shape)
    return shape


def describe_schedule(settings, few_steps, parts):
    """Return what run.json says of the schedule: where its levels come from, the numbers of steps, the parts trained so far."""
    earlier = read_run(settings.student)["schedule"]["parts"] if settings.student is not None else {}
    steps = {name: earlier.get(name, 0) + sum(last - first for part, first, last in parts if part == name) for name in PARTS}
    return {"flow_shift": settings.flow_shift, "few_steps": few_steps or None, "parts": steps}


def open_parts(settings, accelerator):
    """Return the folder of vae/, text_encoder/ and tokenizer/ in diffusers' layout: the teacher's, or the cache that they are
    converted into."""
    found = find_parts(settings.teacher)
    if all(is_converted(found, part) for part in found):
        return Path(settings.teacher)
    files = [path for place in found.values() for path in ([place] if place.is_file() else sorted(place.rglob("*")))
             if path.is_file()]
    with accelerator.main_process_first():
        folder = cache_folder(settings.cache_dir, "parts", files=sampled_digest(("part", path) for path in files))
    if accelerator.is_main_process:
        with in_turn(folder, accelerator.print):
            convert_parts(found, folder, accelerator.print)
    accelerator.wait_for_everyone()
    return folder


def most_frames(tokens):
    """Return on how many frames of so many image tokens a student is calibrated, where there are as many prompts."""
    return max(16, CALIBRATION_TOKENS // tokens)


def compare_experts(settings, files, device):
    """Return the cosines of check_experts(), which reads both experts once: they are kept in the cache, unless it refuses."""
    record = Path(settings.cache_dir) / f"experts-{files.fingerprint[:16]}.json"
    if not record.exists():
        cosines = check_experts(files, device)
        record.parent.mkdir(parents=True, exist_ok=True)
        write_json(record, cosines)
    return json.loads(record.read_text(encoding="utf-8"))


def start_student(settings, student, files, cosines, embeddings, said_by, prompts, latent_size, accelerator):
    """Give the student its first weights, as --projection says; returns the report for run.json, None for a random start.

    A start that lies in the cache is taken as it is, if its teacher, text encoder, shape, prompts and method are the same.
    """
    say, device = accelerator.print, accelerator.device
    if settings.student is not None:
        say(f"start    {settings.student}, a saved student")
        student.load_state_dict(WanLiteStudent.from_pretrained(settings.student, dtype="float32").state_dict())
        return None
    if settings.projection == "none":
        say("random start: nothing is projected (the control)")
        return None
    prompts = prompts[:most_frames(math.prod(latent_size) // math.prod(student.config.patch_size))]
    with accelerator.main_process_first():
        folder = cache_folder(settings.cache_dir, "start", teacher=files.fingerprint, text=said_by, prompts=prompts,
                              student={name: value for name, value in student.config.items() if name[0] != "_"},
                              method=[inspect.getsource(inspect.getmodule(function)) for function in (project, calibrate)],
                              settings=(settings.projection, settings.expert, settings.seed, settings.flow_shift, latent_size))
    if accelerator.is_main_process:
        with in_turn(folder, say):
            if why_broken(folder):
                words = [embeddings[prompt] for prompt in prompts]
                make_start(settings, student, files, cosines, words, latent_size, folder, device, say)
    accelerator.wait_for_everyone()
    say(f"start    {folder}")
    student.load_state_dict(load_file(folder / "diffusion_pytorch_model.safetensors"), strict=True)
    return json.loads((folder / "report.json").read_text())


def make_start(settings, student, files, cosines, words, latent_size, folder, device, say):
    """Project the teacher's weights into the student, refit them where asked, and keep both student and report in `folder`."""
    experts, channels, is_calibrated = choose_experts(files, settings.expert), None, settings.projection == "calibrated"
    if is_calibrated:
        frames = make_frames(experts[0], pack_text(words), latent_size, None, settings.seed, settings.flow_shift, device)
        channels = choose_channels(experts[0], frames, student.config.hidden_size)
    report = project(student, experts, torch.cat(words), channels, device)
    report.cosines = cosines
    if is_calibrated:
        calibrate(student.to(device), experts[0], report, frames)
    say(f"{report}{f'; calibrated on {len(words)} frames' if is_calibrated else ''}")
    with new_folder(folder) as partial_folder:
        student.save_pretrained(partial_folder)
        write_json(partial_folder / "report.json", report.as_dict() | {"calibration_frames": is_calibrated * len(words)})


def teacher_velocity(teacher, settings, negative):
    """Return the guided teacher as a maker of velocity functions of (latents, timestep); see draw_pictures."""
    def velocity_for(text, features=None):
        unwanted = pack_text([negative] * len(text.tokens)).to(text.tokens.device)
        blocks = () if features is None else (feature_block(teacher.config["num_layers"]),)

        def velocity_of(latents, timestep):
            velocity, states = teacher.velocity(latents, timestep, text, unwanted, settings.guidance_scale,
                                                settings.guidance_scale_2, feature_blocks=blocks)
            if features is not None:
                features.append(states[0].float())
            return velocity
        return velocity_of
    return velocity_for


def feature_block(depth):
    """Return the block whose token states are compared: three quarters deep, where text has become layout."""
    return max(0, round(0.75 * depth) - 1)


def feature_width(settings, hidden_size):
    """Return in how many directions token states are compared, and kept: more hold a narrow student up, and fill the disk."""
    return settings.feature_directions or max(1, hidden_size // 4)


class Needs:
    """What a run will need: memory by phase, disk, time. Nothing is read but headers, and phases run without contents."""

    def __init__(self, settings, files, shape, device):
        self.files, self.shape, self.device, self.found = files, shape, device, find_parts(settings.teacher)
        decoder = autoencoder_config(self.found["vae"])
        self.make_autoencoder = partial(make_autoencoder, decoder)
        with init_empty_weights():
            self.student, autoencoder = WanLiteStudent(shape), self.make_autoencoder()
        self.latent_shape, buckets = latent_shapes(settings, files, autoencoder.config.scale_factor_spatial)
        self.largest = max([self.latent_shape, *buckets], key=math.prod)
        self.tokens = math.prod(self.latent_shape[1:]) // math.prod(self.student.config.patch_size)
        self.drawing = 4 * autoencoder.num_parameters()      # it stays, and so does the student once it has a start
        self.weights = 4 * self.student.num_parameters()
        self.resting = self.weights * (3 if settings.muon_learning_rate else 4)     # weights, average, what optimizers remember
        self.standing = self.resting + self.weights + self.drawing                  # what training takes without any states
        self.free = free_memory(device, local_processes())[0]

    def training(self, settings, rows):
        """Return the bytes of training on `rows` states."""
        def make_student(depth):
            student = WanLiteStudent(self.shape | {"depth": depth})
            if settings.gradient_checkpointing:
                student.enable_gradient_checkpointing()
            return student
        return self.drawing + at_depth(lambda depth: simulate_training(
            partial(make_student, depth), partial(make_optimizers, settings), lambda network: EMAModel(network.parameters()), rows,
            self.largest[1:], training_dtype(settings) != torch.float32), self.shape["depth"])

    def asking(self, settings, at_once=SHARD_SIZE):
        """Return the bytes of the teacher, where it is while it is asked, and of so many walks under way."""
        dtype, residency = training_dtype(settings), place_teacher(settings, self.files, self.device)
        rows = min(2 * at_once, max(1, TOKENS_AT_ONCE // self.tokens))      # half of them for guidance
        return (teacher_bytes(self.files, residency, dtype, settings.teacher_fp8, local_processes())[0]
                + pass_peak(self.files, rows, self.largest[1:], dtype) + walk_bytes(at_once, settings.teacher_steps, self.largest))

    def matching(self, settings, rows):
        """Return the bytes of distribution matching: the critic learns beside the student, and the teacher is asked."""
        critic = self.training(settings, max(1, rows // MATCHED)) - self.drawing
        return self.training(settings, rows) + critic + self.asking(settings)

    def fit(self, settings):
        """Return the settings with batch and accumulation filled in where they are open: of BATCH states as many as fit at once."""
        rows, micro_batches = settings.train_batch_size, settings.gradient_accumulation_steps
        if rows is None:
            rows = BATCH
            if is_large(self.files):
                peak, rest = self.training(settings, BATCH), self.standing
                if settings.matching_steps:
                    peak, rest = self.matching(settings, BATCH), 2 * rest - self.drawing + self.asking(settings)
                rows = max(1, largest_batch(BATCH, peak, rest, FILLED * self.free))
            micro_batches = micro_batches or BATCH // rows
        return replace(settings, train_batch_size=rows, gradient_accumulation_steps=micro_batches or 1)

    def tell(self, settings, training, held_out, images):
        """Say what is needed and what there is; returns what does not fit, and what would, in words."""
        walks = len(images) + (settings.num_trajectories or len(training))
        dtype, residency = training_dtype(settings), place_teacher(settings, self.files, self.device)
        looks, several = count_looks(settings.validation_walks, len(held_out))
        drawn, pixels = max(looks, several**2), math.prod(picture_size(settings.resolution))
        together = min(drawn, max(1, DECODED_AT_ONCE // pixels))
        placed = {place: teacher_bytes(self.files, place, dtype, settings.teacher_fp8, local_processes())
                  for place in dict.fromkeys((*RESIDENCIES, residency))}
        phases = {
            "text": num_bytes(self.found["text_encoder"]),
            "trajectories": self.asking(settings, min(SHARD_SIZE, max(walks, drawn))) + self.drawing + self.weights,
            "training": self.training(settings, settings.train_batch_size),
            "validation": self.resting + self.weights + at_depth(           # what is lent keeps its place
                lambda parts: decoding_peak(self.make_autoencoder, decode_latents, parts * together, self.latent_shape),
                -(-drawn // together))}
        comparing, calibrating = start_peaks(self.files, calibration_frames(settings, training, self.tokens), self.latent_shape[1:])
        is_started = any(Path(settings.cache_dir).glob("start-*/manifest.json"))        # and is taken as it is, if it is this run's
        phases["start"] = 0 if is_started else max(comparing, calibrating + self.drawing + self.weights)
        if settings.matching_steps:
            phases["matching"] = self.matching(settings, settings.train_batch_size)
        remembered = (self.resting + self.weights) * (1.5 if settings.matching_steps else 1)        # with the best student so far
        seen = walks + looks + min(several, len(held_out)) * several
        converted = sum(map(num_bytes, {place for part, place in self.found.items() if not is_converted(self.found, part)}))
        disk = {settings.cache_dir: self.weights + converted + text_bytes([*training, *held_out], self.files.config["text_dim"])
                + trajectory_bytes(seen, settings.teacher_steps, self.largest, self.tokens,
                                   feature_width(settings, self.shape["hidden_size"])),
                settings.output_dir: self.weights + sum(map(num_bytes, set(self.found.values())))
                + (settings.checkpoints_total_limit + 1) * remembered}
        return tell(phases, disk, self.device, self.free, residency, placed, settings.train_batch_size,
                    settings.gradient_accumulation_steps, self.standing)


def calibration_frames(settings, prompts, tokens):
    """Return on how many frames of so many image tokens a student is calibrated."""
    if settings.projection != "calibrated" or settings.student is not None:
        return 0
    return min(len(prompts), most_frames(tokens))


def is_large(files):
    """Whether a teacher is so large that a run fits itself to its machine, and says beforehand what it needs."""
    return files.width >= LARGE


def choose_precision(settings, files):
    """Return the settings with --mixed_precision filled in where it is open."""
    has_bf16 = has_gpu() and torch.cuda.is_bf16_supported(including_emulation=False)
    return replace(settings, mixed_precision=settings.mixed_precision or ("bf16" if is_large(files) and has_bf16 else "no"))


def plan(settings, words):
    """Say what a run of these settings will do and need, and whether it fits; nothing is read but headers, nothing is written.

    `words` are those of the command line. Returns the exit code: 0 where it fits, 2 where it does not.
    """
    device = torch.device("cuda" if has_gpu() else "cpu")
    files = open_teacher_files(settings.teacher)
    check_parts(find_parts(settings.teacher), files.config)
    shape, parts, settings = choose_shape(settings, files), parts_of(settings), choose_precision(settings, files)
    needs = Needs(settings, files, shape, device)
    settings = needs.fit(settings)
    training, held_out, images = choose_data(settings, print)
    walks = settings.num_trajectories or len(training)
    settings = replace(settings, **bound_pictures(settings, is_large(files), walks))
    check_batch(settings, walks, 1, parts)
    walks += len(images)                                     # each is asked about as often
    passes = count_passes(settings, walks, len(held_out), parts)
    states = announce(settings, files, needs.student, device, walks, passes, parts, print)
    wrong = needs.tell(settings, training, held_out, images)
    passes += CALIBRATING_PASSES * calibration_frames(settings, training, needs.tokens)
    print("time     " + estimate(needs.student, files, passes, states, needs.tokens, needs.latent_shape[1:], device,
                                 training_dtype(settings)))
    for reason in wrong:
        print(f"PROBLEM  {reason}")
    print(f"run      {shlex.join(['python', Path(__file__).name, *words])}")
    return 2 if wrong else 0


def picture_sizes(settings):
    """Return --resolution as (width, height), and after it the sizes of what is trained on, one a bucket."""
    size = picture_size(settings.resolution)
    return [size, *bucket_sizes(size, settings.aspect_ratios, pixels_per_token(settings.teacher))]


def latent_shapes(settings, files, stride):
    """Return the shape (C, H, W) of the latents of a picture of --resolution, and those of what is trained on, one a bucket."""
    shape, *buckets = ((files.config["in_channels"], height // stride, width // stride)
                       for width, height in picture_sizes(settings))
    return shape, buckets


def training_dtype(settings):
    """Return the dtype that matrices are multiplied in."""
    return torch.float32 if settings.mixed_precision == "no" else torch.bfloat16


def place_teacher(settings, files, device):
    """Return where the teacher's experts will be: as --teacher_residency says, or as memory allows."""
    if settings.teacher_residency != "auto":
        return settings.teacher_residency
    return choose_residency(files, training_dtype(settings), settings.teacher_fp8, *free_memory(device, local_processes()),
                            device.type == "cpu", local_processes())


# ---- looking at it ---------------------------------------------------------------------------------------------------------

@torch.no_grad()
def draw_pictures(velocity_for, autoencoder, embeddings, seeds, scheduler, num_steps, latent_shape, check=lambda: None,
                  batch_size=64):
    """Draw one picture for each embedding and seed: (B, height, width, 3) uint8; `check` may end it between two batches."""
    drawn, device = [], autoencoder.device
    for start in tqdm(range(0, len(embeddings), batch_size), desc="drawing", unit="batch", leave=False,
                      disable=len(embeddings) <= batch_size):
        check()
        text = pack_text(embeddings[start:start + batch_size]).to(device)
        noise = seeded_noise(latent_shape, seeds[start:start + len(text.tokens)]).to(device)
        latents = sample(velocity_for(text), noise, scheduler, num_steps)
        drawn.append(to_pictures(decode_latents(autoencoder, latents)))
    return np.concatenate(drawn)


@torch.no_grad()
def teacher_walks(trajectories, pack, prompts, autoencoder):
    """Return what a student is held against: noise, text, and the teacher's latents (B, C, H, W) and pictures from that noise."""
    noise, latents, numbers = trajectories.ends(range(len(trajectories) // trajectories.states_each))
    pictures = [to_pictures(decode_latents(autoencoder, part.to(autoencoder.device))) for part in latents.split(64)]
    return noise.to(autoencoder.device), pack([prompts[number] for number in numbers.tolist()]), latents, np.concatenate(pictures)


@torch.no_grad()
def compare_walks(walks, velocity_for, num_steps, num_seeds, autoencoder, scheduler, check):
    """Draw from the noise of `walks`, of many prompts and of `num_seeds` seeds each; returns figures of its likeness."""
    drawn = []
    for noise, text, _, _ in walks:
        check()
        latents = sample(velocity_for(text), noise, scheduler, num_steps)
        drawn.append((latents.cpu(), to_pictures(decode_latents(autoencoder, latents))))
    (_, _, latents, pictures), (_, _, _, by_seed) = walks
    by_seed, own_by_seed = (each.reshape(-1, num_seeds, *each.shape[1:]) for each in (by_seed, drawn[1][1]))
    return likeness(*drawn[0], own_by_seed, latents, pictures, by_seed) | {
        "frechet_distance": frechet_distance(drawn[0][1], pictures)}


@torch.no_grad()
def relative_error(student, states, embeddings, prompts, device, check):
    """Return the student's squared velocity error on held-out trajectories, over the power of the teacher's velocity."""
    error = power = 0.0
    for start in range(0, len(states), 256):
        check()
        batch = states.__getitems__(range(start, min(start + 256, len(states))))
        text = pack_text([embeddings[prompts[number]] for number in batch["prompt"].tolist()]).to(device)
        velocity = velocity_in_parts(student, text)(batch["latents"].float().to(device), batch["timestep"].to(device))
        error += (velocity.float().cpu() - batch["velocity"]).square().sum().item()
        power += batch["velocity"].float().square().sum().item()
    return error / power


# ---- the loop --------------------------------------------------------------------------------------------------------------

def train(settings, is_resumed, stop):
    """Project, walk the teacher, distil, validate and save into settings.output_dir; raises Stopped where `stop` asks for it."""
    began, output = time.time(), Path(settings.output_dir)
    check_devices(os.environ)
    files = open_teacher_files(settings.teacher)
    fitted = replace(settings, **fitted_before(output)) if is_resumed else choose_precision(settings, files)
    accelerator = Accelerator(
        kwargs_handlers=[patience()], mixed_precision=fitted.mixed_precision,
        log_with=None if settings.report_to == "none" else settings.report_to,
        project_config=ProjectConfiguration(project_dir=str(output), logging_dir=str(output / settings.logging_dir)))
    device, say, ranks = accelerator.device, accelerator.print, accelerator.num_processes
    set_seed(settings.seed)

    # What there is: teacher, student, prompts.
    check_parts(find_parts(settings.teacher), files.config)
    shape = choose_shape(settings, files)
    needs, student = Needs(settings, files, shape, device), WanLiteStudent(shape)    # its memory is not yet taken
    fitted = fitted if is_resumed else agreed(needs.fit(fitted))
    micro_batches = accelerator.gradient_accumulation_steps = fitted.gradient_accumulation_steps
    with accelerator.main_process_first():                   # one rank looks at images, the others read what it found
        training, held_out, images = choose_data(settings, say, accelerator.is_main_process)
    num_trajectories = settings.num_trajectories or len(training)
    parts = parts_of(settings)
    asked, settings = settings, replace(fitted, **bound_pictures(fitted, is_large(files), num_trajectories))
    check_batch(settings, num_trajectories, ranks, parts)
    num_looked_at, several = count_looks(settings.validation_walks, len(held_out))
    validation = settings.validation_prompts or held_out[:several]
    few_steps = settings.few_steps if parts[-1][0] != "velocity" else []
    run = {"settings": asdict(asked), "versions": versions(), "teacher": files.fingerprint, "student": shape,
           "prompts": fingerprint([training, held_out]), "images": fingerprint([image.sha256 for image in images]),
           "processes": ranks, "fitted": {name: getattr(settings, name) for name in FITTED},
           "student_parameters": student.num_parameters(), "finished": False, "validation_prompts": validation,
           "num_inference_steps": settings.num_inference_steps, "resolution": settings.resolution,
           "schedule": describe_schedule(settings, few_steps, parts)}
    if is_resumed:
        check_resumable(output, run, say)
    walked = num_trajectories + len(images)                  # an image is asked about as often as a trajectory has states
    passes = count_passes(settings, walked, len(held_out), parts)
    states = announce(settings, files, student, device, walked, passes, parts, say)
    if is_large(files) and not settings.project_only:
        wrong = needs.tell(settings, training, held_out, images) if accelerator.is_main_process else []
        refuse_together(accelerator, "\n".join(wrong))
    cosines = compare_experts(settings, files, device) if accelerator.is_main_process and not is_resumed else {}
    parts_folder = open_parts(settings, accelerator)
    said_by = sampled_digest(("part", path) for part in ("text_encoder", "tokenizer")
                             for path in sorted((parts_folder / part).iterdir()) if path.is_file())
    prompts = list(dict.fromkeys([*training, *held_out, *validation, settings.negative_prompt]))
    with accelerator.main_process_first():
        folder = cache_folder(settings.cache_dir, "text", encoder=said_by, length=TEXT_LENGTH, prompts=prompts)
    embeddings = encode_once(accelerator, lazy_encoder(parts_folder, device), prompts, folder)
    autoencoder = load_autoencoder(parts_folder, device=device)
    latent_shape, buckets = latent_shapes(settings, files, autoencoder.config.scale_factor_spatial)
    tokens_each = math.prod(latent_shape[1:]) // math.prod(student.config.patch_size)
    scheduler, dtype = make_scheduler(settings.flow_shift), training_dtype(settings)
    say(f"time     {estimate(student, files, passes, states, tokens_each, latent_shape[1:], device, dtype)}")
    if settings.aspect_ratios:
        stride = autoencoder.config.scale_factor_spatial
        say(f"sizes    {', '.join(f'{width * stride} x {height * stride}' for _, height, width in buckets)}")
    (output / "cache").mkdir(exist_ok=True)
    is_taken = accelerator.is_main_process and hold(output / "cache") is None   # held until the process ends
    refuse_together(accelerator, is_taken and f"{output}: another run is writing there. Wait for it, or name another --output_dir.")
    run["projection"] = start_student(settings, student, files, cosines, embeddings, said_by, training, latent_shape[1:],
                                      accelerator)
    if settings.project_only:
        return accelerator.end_training()
    if accelerator.is_main_process:
        if not is_resumed:                                   # an earlier run goes only now, when this one has its start
            clear(output)
        write_json(output / "run.json", run)
    accelerator.wait_for_everyone()
    if not (output / "run.json").exists():
        raise OSError(f"{output}: what rank 0 wrote there is not here. The machines of a run need one disk under --output_dir.")

    # What the teacher draws: walked once, for training, for held-out prompts, and for a few of these from many seeds.
    teacher = Teacher(files, device, dtype, agreed(place_teacher(settings, files, device)), settings.teacher_fp8)
    in_step = teacher.residency == "sharded"
    guided = teacher_velocity(teacher, settings, embeddings[settings.negative_prompt])
    plain = teacher_velocity(teacher, replace(settings, guidance_scale=1.0, guidance_scale_2=1.0),
                             embeddings[settings.negative_prompt])
    pace = Pace(device, matrix_rate(device, dtype), ranks)
    guided, plain = pace.timed(guided), pace.timed(plain)

    def pack(prompts):
        return pack_text([embeddings[prompt] for prompt in prompts]).to(device)

    def guided_for(prompts, features):
        return guided(pack(prompts), features)

    width_kept = feature_width(settings, shape["hidden_size"])
    made_of = {"teacher": files.fingerprint, "negative_prompt": settings.negative_prompt, "shift": settings.flow_shift,
               "guidance": (settings.guidance_scale, settings.guidance_scale_2), "steps": settings.teacher_steps,
               "text": (said_by, TEXT_LENGTH), "features": width_kept}

    def kept_in(parent, kind, **what):
        with accelerator.main_process_first():
            return cache_folder(parent, kind, **what, **made_of)

    walker = Walker(accelerator, guided_for, scheduler, settings.teacher_steps, in_step)
    some = training[:settings.validation_walks]
    walker.find_basis(kept_in(settings.cache_dir, "basis", prompts=some, latents=latent_shape), some, latent_shape, width_kept)
    first_seed = settings.seed * 10**7
    walks = [(n % len(training), training[n % len(training)], first_seed + n) for n in range(num_trajectories)]
    unseen = held_out[:settings.validation_walks]
    jobs = {"held_out": [(n % len(unseen), unseen[n % len(unseen)], first_seed - 1 - n) for n in range(num_looked_at)],
            "seeds": [(n, prompt, first_seed - 1000 - seed) for n, prompt in enumerate(unseen[:several])
                      for seed in range(several)]}

    def walk(walked, latents):
        return walker.walk(kept_in(settings.cache_dir, "trajectories", walks=walked, latents=latents), walked, latents)

    number_of = {prompt: number for number, prompt in enumerate(training)}

    def at_images(size, latents):
        found = {image.sha256: image for image in images if image.size == size}
        asked = [(number_of[image.caption], image.caption, first_seed - 10**6 - n, image.sha256)
                 for n, image in enumerate(images) if image.size == size]

        def latents_of(digests):
            pictures = np.stack([read_picture(found[sha256]) for sha256 in digests])
            return encode_images(autoencoder, to_pixels(pictures).to(device))
        return walker.ask_at_pictures(kept_in(settings.cache_dir, "images", asked=asked, latents=latents), asked, latents_of)

    pace.restart()
    trajectories = [walk(*bucket) for bucket in zip(deal_out(walks, len(buckets), settings.seed), buckets)]
    pictured = {image.size for image in images} if parts[0][0] == "velocity" else ()
    seen = [walked + at_images(size, latents) if size in pictured else walked
            for walked, size, latents in zip(trajectories, picture_sizes(settings)[1:], buckets)]
    states = {part: walk(walked, latent_shape) for part, walked in jobs.items()}
    walk_figures = pace.walk_figures(settings.teacher_steps)
    if walk_figures:
        say("walked   {walked:,} trajectories, {walks_per_second:.3g} a second, {walk_teacher_share:.0%} of the time in the "
            "teacher".format(**walk_figures))
    check = stop.check if ranks == 1 else lambda: None          # several ranks stop together, at a step
    seeds = list(range(settings.seed, settings.seed + max(len(validation), len(held_out))))
    draw = partial(draw_pictures, autoencoder=autoencoder, scheduler=scheduler, latent_shape=latent_shape, check=check)
    folder = kept_in(settings.cache_dir, "pictures", prompts=validation, seeds=seeds[:len(validation)],
                     reference=settings.reference_steps)
    shown = [embeddings[prompt] for prompt in validation]
    teacher_drawn = kept_once(accelerator, folder, lambda: {"pictures": torch.from_numpy(draw(
        guided, embeddings=shown, seeds=seeds, num_steps=settings.reference_steps))})["pictures"].numpy()
    few = FewSteps(settings.flow_shift, few_steps or [settings.num_inference_steps], latent_shape, settings.teacher_steps,
                   (accelerator.process_index, ranks))
    own_scheduler = few.scheduler if few_steps else scheduler
    draw_own = partial(draw, scheduler=own_scheduler)
    examine = partial(compare_walks, [teacher_walks(states[part], pack, unseen, autoencoder) for part in ("held_out", "seeds")],
                      num_seeds=several, autoencoder=autoencoder, scheduler=own_scheduler, check=check)

    # What learns, and how; all of it is in `memory`, and nothing else has to be remembered.
    set_seed(settings.seed)                                  # again: what lay in the cache has drawn no numbers
    if settings.allow_tf32 and device.type == "cuda":        # only now: a projection solves for weights in full float32
        torch.set_float32_matmul_precision("high")
    student, head = student.to(device), nn.Linear(shape["hidden_size"], width_kept).to(device)
    if settings.gradient_checkpointing:
        student.enable_gradient_checkpointing()
    optimizers = make_optimizers(settings, student, head, is_fused=device.type == "cuda")
    rates = make_rates(settings, optimizers)
    ema = EMAModel(student.parameters(), decay=settings.ema_decay, foreach=device.type == "cuda")
    wrapped, wrapped_head, *_ = accelerator.prepare(student, head, *optimizers)      # whose gradients it unscales
    networks = Networks(wrapped, wrapped_head, feature_block(shape["depth"]), guided, plain, few)
    memory = {"student": student, "feature_head": head, "ema": ema, "rates": rates, "optimizers": optimizers,
              "step": 0, "skipped": 0, "own_path": {}, "looked": {}, "best": {}, "beyond": 0}
    memory |= {"scaler": accelerator.scaler} if accelerator.scaler else {}
    if settings.matching_steps:
        critic = copy.deepcopy(student)
        networks.critic_optimizers = make_optimizers(settings, critic, rate=settings.critic_learning_rate,
                                                     is_fused=device.type == "cuda")
        memory |= {"critic": critic, "critic_optimizers": networks.critic_optimizers}
        networks.critic = accelerator.prepare(critic)
    for network in (student, critic) if settings.matching_steps else (student,):
        pace.count(network)
        if settings.compile:                                 # block by block, in place: names and weights stay as they are
            network.compile_repeated_blocks()
    if is_resumed:
        resume(memory, output, device, say)
    step = memory["step"]
    tensorboard = {"purge_step": step + 1} if step else {}     # what was logged after the checkpoint is logged again
    accelerator.init_trackers("wanlite", init_kwargs={"tensorboard": tensorboard, "wandb": {"dir": str(output)}})
    log = MetricsLog(output / "metrics.jsonl", step) if accelerator.is_main_process else None
    began -= log.seconds if log else 0                       # what the run took before it was cut short

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
                    log_picture(tracker, "teacher above student", picture, step)
        except OSError as error:
            say(f"WARNING: step {step} is not logged: {error}")

    def read(data, numbers):
        batch = data.__getitems__(data.in_order(numbers)[accelerator.process_index::ranks])
        return batch, pack_text([embeddings[training[number]] for number in batch["prompt"].tolist()])

    def validate(step, part):
        """Look at the averaged student: figures, a grid, and whether it is the best so far."""
        with averaged(ema, student, settings.use_ema):
            figures = {"held_out_error": relative_error(student, states["held_out"], embeddings, held_out, device, check)}
            looks = {count: examine(partial(velocity_in_parts, student), num_steps=count) for count in few.counts}
            figures, looks = agreed((figures, looks))        # by which every rank chooses, and ends
            figures |= {f"{name}_{count}": value for count, look in looks.items() for name, value in look.items()}
            grid = {f"teacher {settings.reference_steps} steps": teacher_drawn}
            for count, look in reversed(looks.items()):
                said = [f"{name} {look[measure]:.2f}" for name, measure in GRID_FIGURES.items()]
                grid[", ".join([f"student {count} step{'s' * (count > 1)}", *said])] = draw_own(
                    partial(velocity_in_parts, student), embeddings=shown, seeds=seeds, num_steps=count)
            tell(step, grid=grid, **figures)
            memory["looked"] = {"step": step, **figures}
            if part != "velocity" or not few_steps:
                consider(step, figures, looks)
        pace.restart()                                       # looking and saving are no part of a step

    def consider(step, figures, looks):
        """Keep the student that is lent just now if no guard is against it and none before it was better."""
        score = sum(look[measure] for look in looks.values()) / len(looks)
        against = [f"in {count} steps {reason}" for count, look in looks.items() for reason in beyond_guards(look)]
        memory["beyond"] = memory["beyond"] + 1 if against and memory["best"] else 0
        if against:
            say(f"\nstep {step} is no candidate to be saved: {'; '.join(against)}")
        elif not memory["best"] or score < memory["best"]["score"]:
            weights = {name: tensor.detach().cpu().clone() for name, tensor in student.state_dict().items()}
            memory["best"] = {"step": step, "score": score, "figures": figures, "weights": weights}

    def checkpoint(step):
        """Save what the run remembers; a disk that is full costs this checkpoint, not the run and no earlier one."""
        if accelerator.is_main_process:
            try:
                save_checkpoint(output, memory | {"step": step}, run, settings.checkpoints_total_limit)
            except OSError as error:
                newest = latest_checkpoint(output)[0]
                say(f"\nWARNING: step {step} is NOT saved: {error}\nThe newest checkpoint is {newest}; training goes on.")
        accelerator.wait_for_everyone()
        pace.restart()

    def walk_own(first):
        """Walk the averaged student's own path, once for the part that begins at step `first`; returns its states by bucket."""
        if not settings.own_path_pictures or not few.stops:
            return [None] * len(buckets)
        with averaged(ema, student, settings.use_ema):
            if memory["own_path"].get("first") != first:
                memory["own_path"] = {"first": first, "student": agreed(digest(student))}
            paths = [(*walks[n % len(walks)], *few.stops[n % len(few.stops)])
                     for n in range(first, first + settings.own_path_pictures)]
            return [walk_bucket(*bucket, first) for bucket in zip(deal_out(paths, len(buckets), settings.seed), buckets)]

    def walk_bucket(paths, latents, first):
        folder = kept_in(output / "cache", "own-path", paths=paths, latents=latents, student=memory["own_path"]["student"])
        if step != first and not any(folder.glob("shard-*")):
            raise OSError(f"{folder}: the states that the student met at step {first} are gone, and it is past that step. Put "
                          "them back, or add --overwrite to start again.")
        return walker.walk_own_path(folder, paths, latents, lambda said: velocity_in_parts(student, pack(said)), few.scheduler)

    if walk_figures:
        tell(step, **walk_figures)
    bar = tqdm(total=settings.max_train_steps, initial=step, desc="distilling", unit="step", smoothing=0.05,
               disable=not accelerator.is_main_process)
    stop.is_immediate, is_asked = False, False               # from here on a stop waits until nothing is lost by it
    in_a_row, total_loss = 0, torch.zeros((), device=device)
    measure = "frechet_distance" if settings.matching_steps else "picture_error"
    try:
        for number, (part, first, last) in enumerate(parts):
            if step >= last or memory["beyond"] >= MOST_BEYOND:
                continue
            if part == "matching" and step == first:         # the critic begins as the student that it will watch
                critic.load_state_dict(student.state_dict())
            data = Buckets(seen if part == "velocity" else
                           [Segments(walked, few.levels, own) for walked, own in zip(trajectories, walk_own(first))])
            batches = SeededBatches(data.sizes, settings.train_batch_size * ranks, settings.seed + 1000 * number,
                                    (step - first) * micro_batches, (last - first) * micro_batches)
            if part != "matching":
                teacher.rest()                               # nobody asks it while the student learns from what is kept
            if step % settings.validation_steps == 0 and memory["looked"].get("step") != step:
                validate(step, part)
            coming = read_ahead(partial(read, data), batches, device, AHEAD if device.type == "cuda" else 0)
            for micro_batch, (batch, text) in enumerate(pace.deal(coming)):
                if is_asked or (ranks == 1 and stop.asked):
                    raise Stopped
                drawn_by = (settings.seed, step, micro_batch % micro_batches, 0)     # the same on all ranks; see FewSteps
                with accelerator.accumulate(wrapped, wrapped_head):
                    with accelerator.autocast():
                        loss, told_apart = STEPS[part](networks, settings, batch, text, (step - first) / (last - first),
                                                       torch.Generator().manual_seed(hash(drawn_by) % 2**63))
                    accelerator.backward(loss)
                    total_loss += loss.detach() / micro_batches
                    if not accelerator.sync_gradients:
                        continue
                    norm = accelerator.clip_grad_norm_([*wrapped.parameters(), *wrapped_head.parameters()],
                                                       settings.max_grad_norm)
                    # The one time a step waits for the device: is it sound on every rank, and was any of them asked to stop?
                    told = torch.stack([total_loss, norm.float(), total_loss.new_tensor(stop.asked)])
                    mean_loss, norm, asked = accelerator.reduce(told, "mean").tolist()
                    is_asked, is_sound = asked > 0, math.isfinite(mean_loss + norm)
                    total_loss.zero_()
                    for optimizer in optimizers:
                        if is_sound:
                            optimizer.step()
                        optimizer.zero_grad()
                    if accelerator.scaler is not None:       # once: accelerate would for each optimizer, and unscale again
                        accelerator.scaler.update()
                for rate in rates:
                    rate.step()
                step += 1
                bar.update()
                if is_sound:
                    ema.step(student.parameters())
                    in_a_row = 0
                else:
                    memory["skipped"], in_a_row = memory["skipped"] + 1, in_a_row + 1
                    if in_a_row == MOST_SKIPPED:
                        raise FloatingPointError(
                            f"{MOST_SKIPPED} steps in a row, up to {step}, had no finite gradient (loss {mean_loss}, norm {norm}). "
                            "Add --overwrite and lower --learning_rate and --muon_learning_rate, or --mixed_precision no.")
                if step % LOG_STEPS == 0 or step == last or not is_sound:
                    record = {"loss": mean_loss, "grad_norm": norm, "learning_rate": rates[0].get_last_lr()[0],
                              "skipped_steps": memory["skipped"], **{name: value.item() for name, value in told_apart.items()}}
                    record |= (figures := pace.figures())
                    bar.set_postfix(part=part, loss=f"{mean_loss:.3f}", **in_brief(figures), refresh=False)
                    tell(step, seconds=round(time.time() - began, 1), **record)
                if step % settings.validation_steps == 0 and step < settings.max_train_steps:
                    validate(step, part)
                if step % settings.checkpointing_steps == 0 or step == settings.max_train_steps:
                    checkpoint(step)
                if memory["beyond"] >= MOST_BEYOND:
                    say(f"\nended at step {step}: {MOST_BEYOND} validations in a row were beyond a guard")
                    break
    except Stopped:
        checkpoint(step)
        accelerator.end_training()
        say(f"\nstopped at step {step} of {settings.max_train_steps}")
        raise
    stop.is_immediate = True                                 # the last checkpoint holds all that is needed below
    bar.close()

    # What is kept: the averaged student that validation found best, what inference needs beside it, and how good it is.
    stop.check()
    if memory["looked"].get("step") != step:
        validate(step, parts[-1][0])
    if settings.use_ema:
        ema.copy_to(student.parameters())
    figures, chosen = memory["looked"], {"step": step, "why": "the last step, for a guard was against every student before it"}
    if memory["best"]:
        student.load_state_dict(memory["best"]["weights"])
        figures, chosen = memory["best"]["figures"], {"step": memory["best"]["step"], measure: memory["best"]["score"],
                                                      "why": f"the lowest {measure} of the validations without a guard against"}
    if accelerator.is_main_process:
        student.save_pretrained(output)
        save_parts(output, parts_folder, own_scheduler)
    results = {name: value for name, value in figures.items() if name != "step"}
    if settings.resolution == shapes.PICTURE_SIZE and (in_step or accelerator.is_main_process):
        words = [embeddings[prompt] for prompt in held_out]
        results |= compare(
            lambda _: draw(guided, embeddings=words, seeds=seeds, num_steps=settings.reference_steps),
            {count: lambda _, count=count: draw_own(partial(velocity_in_parts, student), embeddings=words, seeds=seeds,
                                                    num_steps=count) for count in few.counts},
            settings.num_inference_steps, held_out)
    if accelerator.is_main_process:
        write_json(output / "run.json", run | {"finished": True, "steps": step, "minutes": (time.time() - began) / 60,
                                               "skipped_steps": memory["skipped"], "chosen": chosen, "results": results})
        write_model_card(output, settings, few_steps, results)
        conclude(settings, output, results, chosen, time.time() - began, say)
    accelerator.end_training()


def resume(memory, output, device, say):
    """Give everything in `memory` the state of the newest checkpoint that verifies; 0 steps where there is none yet."""
    path, skipped = latest_checkpoint(output)
    for reason in skipped:
        say(reason)
    if path is None:
        if skipped:
            raise OSError(f"{output}: no checkpoint verifies, so nothing can be resumed. Add --overwrite to start again.")
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


# ---- main --------------------------------------------------------------------------------------------------------------------

def main(settings, is_resumed):
    """Train in --output_dir, or say what that would need; returns the exit code."""
    try:
        if settings.dry_run:
            return 0 if not is_first() else plan(settings, [word for word in sys.argv[1:] if word != "--dry_run"])
        train(settings, is_resumed, StopSignal(is_launched=is_launched()))
    except (OSError, ValueError, FloatingPointError) as error:
        give_way()
        print(f"train_distillation.py: {error}", file=sys.stderr)
        return 2
    except torch.OutOfMemoryError as error:
        print(f"train_distillation.py: {str(error).splitlines()[0]} What the teacher has said is kept. See that nothing else is on "
              "the device, or add --overwrite and a lower --train_batch_size with more --gradient_accumulation_steps, "
              "--gradient_checkpointing, or --teacher_residency disk.", file=sys.stderr)
        return 2
    except RuntimeError as error:
        if not (is_launched() and is_lost(error)):
            raise
        print(f"train_distillation.py: another process of this run is gone ({str(error).splitlines()[0]}). What ended it was said "
              "by itself or its machine; the same command goes on from the newest checkpoint.", file=sys.stderr)
        return 2
    except Stopped:
        if is_first():
            print("stopped; the same command goes on from what is on disk.", file=sys.stderr)
        return STOPPED
    return 0


if __name__ == "__main__":
    sys.exit(main(SETTINGS, IS_RESUMED))
