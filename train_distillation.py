"""Project a Wan teacher's weights into a small student, distil it from prompts alone, and save it.

    python train_distillation.py                                 # the tiny teacher
    python train_distillation.py --teacher DIR --prompts FILE    # one GPU machine
    accelerate launch train_distillation.py --teacher ...        # several GPUs

A run writes to --output_dir; after an interruption, the same command resumes it.
"""
# Order of this file: settings, WanLiteStudent, the dry run, a run and its loop over the phases of wanlite/phases.py.

import gc
import os
import signal
import sys
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

from wanlite.files.atomic import write_json
from wanlite.files.file_names import BASE, CACHE, RUN
from wanlite.files.locks import alone, lock
from wanlite.parts.defaults import PARTS, STUDENT_IMAGES
from wanlite.phases import FEW_STEP_PASSES, MIN_FEW_STEPS, MIN_TRAJECTORIES
from wanlite.planning.budgets import BUDGETS
from wanlite.planning.config_files import parse_with_config
from wanlite.planning.part_settings import MEANINGS, part_setting
from wanlite.planning.resolve import (
    EMA_DECAY,
    EMA_SHARE,
    MAX_VALIDATIONS,
    NAMED_TEACHERS,
    REAL_STEPS,
    REAL_TEACHERS,
    TINY_STEPS,
    VALIDATION_STEPS,
    complete,
)
from wanlite.planning.settings import make_parser, setting
from wanlite.runtime.launch import defer_to_rank_zero, is_first, is_launched
from wanlite.runtime.signals import Stopped, StopSignal
from wanlite.runtime.terminal import (
    EXIT_CODE,
    EXPLAINED,
    explain,
    hide_loading_bars,
    keep_output_open,
    labelled,
    print_error,
)
from wanlite.training.model_card import write_model_card
from wanlite.training.publishing import create_repository, publish
from wanlite.training.run_folder import (
    SMALL,
    check_output_folder,
    check_resumable,
    clear,
    lacks_parts,
    link_file,
    read_run,
    save_components,
    seal,
)

STOPPED = 3  # exit code of a run that was stopped by a signal; it can be resumed
PATIENCE = 2  # training ends after this many rejected validations in a row, none closer to the teacher
CHANGEABLE_ON_RESUME = (  # settings that do not affect the weights
    "config",
    "teacher",
    "teacher_residency",
    "output_dir",
    "cache_dir",
    "dry_run",
    "push_to_hub",
    "plan_for",
    "overwrite",
    "resume_from_checkpoint",
    "project_only",
    "checkpointing_steps",
    "report_to",
    "checkpoints_total_limit",
    "logging_dir",
    "text_encoder",  # and the others of small parts, which are made of the saved student
    "decoder",
    "student_images",
    *MEANINGS,
)


# ---- settings ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Settings:
    teacher: str | None = setting(
        None,
        "Wan folder in the diffusers, official or ComfyUI layout; a name on the hub, as organisation/model, which "
        f"is downloaded; or a teacher of this repository: {' or '.join(NAMED_TEACHERS)} "
        f"(default: ./{REAL_TEACHERS[0]} if it exists, else tiny)",
        group="teacher and data",
        aliases=("--teacher_checkpoint_path", "--teacher_path"),
        is_path=True,
        brief="Wan2.2: a folder or a name on the hub; or tiny, emoji (default: a Wan2.2 in this folder, else tiny)",
    )
    prompts: str | None = setting(
        None,
        "text file with one prompt per line, or a .jsonl, .json, .csv, .tsv or .parquet file with a column "
        "prompt, text or caption (default: generated prompts; for the tiny teacher, captions of its world)",
        is_path=True,
        brief="text file, one prompt per line (default: generated)",
    )
    images: str | None = setting(
        None,
        "captioned images for the velocity phase: a folder with a .txt file per image or with metadata.jsonl "
        "or .csv, .parquet files, a folder saved by datasets, or webdataset .tar files (default: none)",
        is_path=True,
        brief="folder of captioned images (default: none)",
    )
    num_images: int | None = setting(None, "use at most this many images (default: all)", least=1)
    output_dir: str = setting(
        "./outputs/wan_t2i",
        "folder of the run and of the saved student",
        group="output",
        is_path=True,
        brief=True,
    )
    config: str | None = setting(
        None,
        "file of settings, .toml or .json, or the run.json of a run to repeat; flags win (default: none)",
        is_path=True,
        brief="file of settings, .toml or .json (default: none)",
    )
    budget: str | None = setting(
        None,
        "preset of --resolutions, --num_trajectories and --max_train_steps for Wan2.2: about 5 hours, a day or "
        "a week of an H100; flags that are set win (default: none, which is about the trial)",
        choices=tuple(BUDGETS),
        brief="about 5 hours, a day or a week of an H100 for Wan2.2 (default: none)",
    )
    cache_dir: str | None = setting(
        None,
        "folder of everything that the teacher computes, can be shared by runs (default: cache/ in --output_dir; for "
        "converted parts of a teacher, ~/.cache/wanlite)",
        is_path=True,
    )
    cache_gb: float | None = setting(
        None,
        "most disk for the teacher's trajectories in GB; lowers the default of --num_trajectories (default: no limit)",
        above=0,
    )
    dry_run: bool = setting(
        False,
        "print the plan of the run and its memory, disk and time, then stop",
        brief="print memory, disk and time of the run, then stop",
    )
    plan_for: str | None = setting(
        None,
        "plan for a machine of this GPU and CPU memory, as 24GB,64GB; needs --dry_run (default: this machine)",
        brief="with --dry_run: GPU and CPU memory of another machine, as 24GB,64GB (default: this one)",
    )
    overwrite: bool = setting(False, "replace a finished run in --output_dir", brief=True)
    push_to_hub: str | None = setting(
        None,
        "upload the saved student to this model of the hub, as organisation/model (default: no upload)",
        brief="upload to this model of the hub (default: no upload)",
    )
    resume_from_checkpoint: str = setting(
        "latest", "resume an interrupted run in --output_dir, or start again", choices=("latest", "none")
    )

    hidden_size: int | None = setting(
        None, "width (default: 1024; half the width of a small teacher)", group="student", least=1
    )
    depth: int | None = setting(None, "number of blocks (default: 16; all of a small teacher)", least=1)
    num_heads: int | None = setting(
        None, "number of attention heads (default: heads of half the teacher's head size)", least=1
    )
    ffn_dim: int | None = setting(
        None, "inner width of the feed-forward layers (default: 4 * hidden_size)", least=1
    )
    projection: str = setting(
        "calibrated",
        "initialization: the teacher's weights, the same refitted to the teacher's activations, or random",
        choices=("weights", "calibrated", "none"),
    )
    expert: str = setting(
        "high",
        "expert to project if the teacher has two; best_per_block chooses by energy and requires "
        "--projection weights",
        choices=("low", "high", "best_per_block"),
    )
    project_only: bool = setting(
        False, "save the projected student in --output_dir and stop; later runs in this folder reuse it"
    )
    student: str | None = setting(
        None,
        "folder of a saved student to train further, instead of projecting (default: none)",
        is_path=True,
        brief="train this saved student further (default: none)",
    )

    guidance_scale: float = setting(
        4.0,
        "guidance of the high-noise expert or of a single expert, distilled into the student",
        group="teacher trajectories",
        least=1,
        most=100,
    )
    guidance_scale_2: float = setting(
        3.0, "guidance of the low-noise expert, distilled into the student", least=1, most=100
    )
    negative_prompt: str = setting("", "prompt that guidance steers away from (default: empty)")
    flow_shift: float | None = setting(
        None, "shift of the noise schedule (default: 3 to 5, by the size of the images)", above=0, most=100
    )
    resolution: list[int] | int | None = setting(
        None,
        "pixels, as one number for squares or as WIDTH HEIGHT, divisible by 16, for TI2V-5B by 32 "
        "(default: the tiny teacher's own, else 512)",
        brief="one or two sides in pixels (default: 64 tiny, 512)",
    )
    resolutions: list[int] | None = setting(
        None,
        "train the velocity phase on ever larger squares, as 256 512, and the later phases on the last, which "
        "becomes --resolution (default: --resolution alone)",
    )
    aspect_ratios: list[str] | None = setting(
        None,
        "train on these ratios, as 1:1 3:2 2:3, each with about the area of --resolution "
        "(default: the ratio of --resolution)",
    )
    teacher_residency: str = setting(
        "auto",
        "placement of the experts: both on the device; one there and one in CPU memory; sharded over the GPUs "
        "of a machine; streamed from CPU memory by block; read from disk at each pass; auto takes the first "
        "that fits",
        choices=("auto", "both", "one", "sharded", "streamed", "disk"),
    )
    teacher_fp8: bool = setting(
        False, "keep the matrices of the experts in float8, which halves their memory"
    )
    teacher_steps: int = setting(20, "guided steps of a trajectory", least=1, most=1000)
    num_trajectories: int | None = setting(
        None,
        f"number of trajectories (default: one per prompt, at least {MIN_TRAJECTORIES}; few prompts get several "
        "each, from different noise)",
        least=1,
        brief=f"images of the teacher to train on (default: one per prompt, at least {MIN_TRAJECTORIES})",
    )

    num_held_out: int = setting(
        400, "prompts for validation only, at most a twentieth of a prompts file", least=1
    )

    train_batch_size: int | None = setting(
        None,
        "micro-batch per device (default: 128; with a large teacher, the largest that fits)",
        group="phases and steps",
        was="batch_size",
        least=1,
        brief="images per device in a step (default: what fits)",
    )
    max_train_steps: int | None = setting(
        None,
        f"optimizer steps of all phases (default: {TINY_STEPS} for the tiny teacher, else {REAL_STEPS})",
        least=1,
        brief=f"optimizer steps (default: {TINY_STEPS} tiny, {REAL_STEPS} Wan2.2)",
    )
    few_step_train_steps: int | None = setting(
        None,
        "steps of the few-step phase (default: 5/7 of --max_train_steps less --matching_steps; of any teacher "
        f"but the tiny one at most {FEW_STEP_PASSES} passes over the images, or {MIN_FEW_STEPS} steps)",
        was="segment_steps",
        least=0,
    )
    matching_steps: int = setting(
        0, "steps of the matching phase, distribution matching with a critic", least=0
    )
    few_steps: list[int] = setting(
        (1, 2, 4),
        "sampling steps that the student is trained for, divisors of --teacher_steps",
        least=1,
        brief="sampling steps of the student",
    )
    rollout_states: int | None = setting(
        None,
        "on-policy states that the teacher continues, in each half of the few-step phase (default: one per "
        "trajectory, or one per 8 with a large teacher, at most 512)",
        was="own_path_pictures",
        least=0,
    )
    gradient_accumulation_steps: int | None = setting(
        None,
        "micro-batches per step (default: enough for 128 states if --train_batch_size is not set, else 1)",
        least=1,
    )
    learning_rate: float = setting(
        3e-3,
        "peak for AdamW at width 64; wider students divide it by size and role, see docs/method.md",
        group="optimizers",
        was="lr",
        above=0,
        most=1,
    )
    lr_scheduler: str = setting(
        "cosine",
        "schedule of each phase, as in diffusers",
        choices=("cosine", "linear", "constant_with_warmup"),
    )
    lr_warmup_steps: int = setting(100, "steps to reach the peak, at most a quarter of each phase", least=0)
    muon_learning_rate: float = setting(
        0.09,
        "peak for Muon, which trains the matrices of the blocks; 0 trains all with AdamW",
        least=0,
        most=10,
    )
    adam_beta2: float = setting(0.99, "decay of the second moment in AdamW", least=0, below=1)
    adam_weight_decay: float = setting(0.01, "decoupled weight decay", least=0, most=1)
    max_grad_norm: float = setting(1.0, "clip gradients to this norm", above=0)
    feature_weight: float = setting(
        3.0,
        "initial weight of the feature loss, which falls to 0 over the velocity phase",
        group="losses",
        least=0,
    )
    feature_directions: int | None = setting(
        None,
        "compare hidden states in this many principal directions of the teacher; students of several widths share "
        "trajectories of the same number (default: a quarter of the student's width)",
        least=1,
    )
    diversity_gain: float = setting(
        0.3,
        "few-step phase: push the targets of one prompt apart by this fraction, against loss of diversity; "
        "0 = off",
        was="variety_gain",
        least=0,
        most=10,
    )
    anchor_weight: float = setting(1.0, "matching phase: weight of the few-step loss", least=0)
    critic_learning_rate: float = setting(
        5e-4,
        "matching phase: AdamW peak for the critic; its Muon peak keeps the student's ratio",
        above=0,
        most=1,
    )
    critic_updates: int = setting(3, "matching phase: critic updates per student update", least=1)
    critic_lerp: float = setting(
        0.03,
        "matching phase: move the critic towards the student by this fraction after each critic update",
        was="critic_pull",
        least=0,
        most=1,
    )
    use_ema: bool = setting(
        True, "save an exponential moving average of the weights", group="precision and speed"
    )
    ema_decay: float | None = setting(
        None,
        f"decay of the average per step (default: {EMA_DECAY}; 1 - {EMA_SHARE} / --max_train_steps of a long run)",
        least=0,
        below=1,
    )
    mixed_precision: str | None = setting(
        None,
        "as in accelerate; master weights and losses stay in float32 (default: from accelerate launch, else "
        "bf16 with a large teacher on a GPU, else no)",
        choices=("no", "bf16", "fp16"),
    )
    gradient_checkpointing: bool = setting(False, "recompute blocks in the backward pass, which saves memory")
    compile: bool | None = setting(
        None,
        "compile the blocks of the student and, on a GPU, of the teacher, which takes minutes and a C++ compiler, "
        "for faster steps (default: on a GPU with a large teacher)",
    )
    deterministic: bool = setting(
        False, "use deterministic kernels on CUDA: a resumed run has exactly the weights, at slower steps"
    )
    allow_tf32: bool = setting(False, "multiply float32 matrices in TF32 on CUDA")

    text_encoder: str = setting(
        "large",
        "small also saves the student in small/ of --output_dir, with a small text encoder that is made after "
        "training",
        choices=PARTS,
        group="small parts",
        brief="small: save one too, in small/",
    )
    decoder: str = setting(
        "large",
        "small does the same with the decoder; with both, small/ has both",
        choices=PARTS,
        brief="small: save one too, in small/",
    )
    student_images: int = setting(
        STUDENT_IMAGES, "images of the student from which small parts learn", least=1
    )
    text_width: int | None = part_setting("text_width")
    text_depth: int | None = part_setting("text_depth")
    text_heads: int | None = part_setting("text_heads")
    text_ffn_dim: int | None = part_setting("text_ffn_dim")
    vocabulary: str | None = part_setting("vocabulary")
    decoder_base_dim: int | None = part_setting("decoder_base_dim")
    decoder_steps: int | None = part_setting("decoder_steps")
    reading_steps: int | None = part_setting("reading_steps")
    text_velocity_steps: int | None = part_setting("text_velocity_steps")

    checkpointing_steps: int = setting(
        500, "save the training state every this many steps", group="checkpoints and validation", least=1
    )
    checkpoints_total_limit: int = setting(2, "keep this many of the newest checkpoints", least=2)
    validation_steps: int | None = setting(
        None,
        "validate every this many steps: metrics, an image grid and a candidate for the saved student "
        f"(default: {VALIDATION_STEPS}, or a {MAX_VALIDATIONS}th of a long run)",
        least=1,
    )
    validation_trajectories: int | None = setting(
        None,
        "validate on at most this many trajectories of each kind (default: 64; with a large teacher, one per "
        "20 training trajectories, at least 4)",
        was="validation_walks",
        least=4,
        most=64,
    )
    reference_steps: int | None = setting(
        None,
        "guided steps of the teacher's images in the grids (default: twice --teacher_steps)",
        least=1,
        most=1000,
    )
    validation_prompts: list[str] | None = setting(
        None,
        "prompts of the grids (default: eight, held-out ones first)",
        brief="prompts of the validation images (default: eight)",
    )
    num_inference_steps: int = setting(
        4, "sampling steps in validation and, by default, of the saved student", least=1, most=1000
    )
    report_to: str = setting(
        "tensorboard", "tracker, as in accelerate: tensorboard, wandb, ...; none writes metrics.jsonl only"
    )
    logging_dir: str = setting("logs", "folder of the tracker's files, inside --output_dir", is_path=True)
    seed: int = setting(0, "seed of all random numbers", least=0, below=2**32, brief=True)


def read_settings():
    """Read and check the command line without importing torch; exits with one line and code 2 on an error.

    Returns the settings, completed from folders and files, and whether an interrupted run is resumed.
    """
    parser = make_parser(Settings, __doc__)
    settings = Settings(**vars(parse_with_config(parser)))
    try:
        settings = complete(settings)
        is_resumed = not settings.dry_run and is_interrupted(settings)  # plan() lists errors as problems
    except (OSError, ValueError) as error:
        message = explain(error)
        parser.refuse(*message.splitlines() if settings.dry_run else [message])  # a problem each line
    if not settings.dry_run:
        if settings.push_to_hub is not None and is_first():
            try:
                create_repository(settings.push_to_hub)
            except ValueError as error:
                parser.refuse(explain(error))
        try:
            Path(settings.output_dir).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            parser.refuse(
                f"--output_dir {settings.output_dir}: cannot be created ({error.strerror}). Choose another."
            )
    return settings, is_resumed


def is_interrupted(settings):
    """Whether --output_dir holds an interrupted run of these settings, which will be resumed.

    A finished run whose small parts are missing counts as interrupted. Raises ValueError as check_output_folder()
    does, and for --project_only.
    """
    fixed = {name: value for name, value in asdict(settings).items() if name not in CHANGEABLE_ON_RESUME}
    is_restarted = settings.overwrite or settings.resume_from_checkpoint == "none"
    if makes_parts(settings) and not is_restarted and lacks_parts(settings.output_dir, fixed):
        return True
    state = check_output_folder(
        settings.output_dir, fixed, settings.overwrite, settings.resume_from_checkpoint != "none"
    )
    if state == "resume" and settings.project_only:
        raise ValueError(
            f"{settings.output_dir}: holds an interrupted run. Leave --project_only out to resume it, add "
            "--overwrite to replace it, or name another --output_dir."
        )
    return state == "resume"


def makes_parts(settings):
    """Whether a run makes small parts after its training."""
    return "small" in (settings.text_encoder, settings.decoder)


if __name__ == "__main__":  # arguments and paths are checked before torch is imported, which takes seconds
    keep_output_open()
    gc.disable()  # imports create a million objects that are never freed
    # Until training starts, Ctrl-C ends the program at once, without a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    # Threads that spin at barriers for long stall beside any other busy program.
    os.environ.setdefault("GOMP_SPINCOUNT", "5000")
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")  # sizes vary by phase
    SETTINGS, IS_RESUMED = read_settings()

import inspect
import json
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from itertools import islice
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration, release_memory, set_seed
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from diffusers.utils.peft_utils import apply_lora_scale

from wanlite.data.autoencoder import load_autoencoder
from wanlite.data.text_encoder import load_tokenizer, warn_of_truncation
from wanlite.flow import FewSteps, make_scheduler
from wanlite.network import TEXT_LENGTH, TextTokens, compile_blocks, one_frame_velocity
from wanlite.parts.folder import Student as TrainedStudent
from wanlite.parts.folder import describe as describe_folder
from wanlite.parts.folder import make_folder
from wanlite.parts.vocabulary import read_vocabulary
from wanlite.planning.defaults import choose_prompts, describe_schedule, max_calibration_frames
from wanlite.planning.duration import measure_matrix_rate
from wanlite.planning.hardware import is_large, training_dtype
from wanlite.planning.messages import announce, command, conclude, describe_kept, drawing_command
from wanlite.planning.report_facts import describe_for_report, resuming_arguments, without_flags
from wanlite.planning.run import resolve_run
from wanlite.runtime.devices import (
    as_device,
    as_dtype,
    disable_cudnn_attention,
    has_gpu,
    use_deterministic_kernels,
)
from wanlite.runtime.progress import print_above
from wanlite.runtime.ranks import abort_all_ranks, check_devices, is_peer_failure, process_group_options
from wanlite.student.building import add_layers, complete_config, config_defaults, initialize_weights
from wanlite.student.config import OUR_NAMES, check_shape, student_arguments
from wanlite.student.digest import model_digest
from wanlite.student.initialization import compare_experts, initialize_student, project_into
from wanlite.student.location import student_folder
from wanlite.student.pretrained import (
    ReadOptions,
    build_student,
    check_save_options,
    make_loading_info,
    read_student,
    refuse_unknown,
    write_student,
)
from wanlite.student.quantization import quantize
from wanlite.student.shape import DEFAULT_EXPERT
from wanlite.teacher.model import Teacher
from wanlite.training.batches import micro_batches
from wanlite.training.phase_table import PHASES, phases_to_train
from wanlite.training.report.history import read_history
from wanlite.training.report.verdict import judge_run
from wanlite.training.run_log import RunLog, try_report
from wanlite.training.state import make_training_state
from wanlite.training.teacher_data import PromptEmbeddings, TeacherData, open_components
from wanlite.training.throughput import Pace
from wanlite.training.training_step import training_step
from wanlite.training.validation import MEASURE, Validator

# ---- the model ---------------------------------------------------------------------------------------------


@dataclass
class StudentOutput(Transformer2DModelOutput):
    features: list | None = None


class WanLiteStudent(WanTransformer3DModel):
    """A small Wan transformer that generates single frames, with the blocks and key names of diffusers.

    `WanLiteStudent(hidden_size=64, depth=4, num_heads=2)` and `WanLiteStudent({"hidden_size": 64, ...})` build a
    student with random weights; `teacher_checkpoint_path=DIR` projects the weights of that teacher into it, and is
    not stored in the config. The config also has all settings of a stock WanTransformer3DModel; config.json is
    that of a stock model.
    """

    _no_split_modules = ["OneFrameBlock"]
    _repeated_blocks = ["OneFrameBlock"]
    _cp_plan = None  # one frame is too short to be split over devices
    # Arguments that pipelines pass to their components; see refuse_unknown().
    _left_to_stock = ("max_memory", "offload_folder", "offload_state_dict", "use_flashpack")
    ignore_for_config = ["teacher_checkpoint_path", "projection", "expert"]

    def __init__(
        self,
        hidden_size: int | Mapping = 1024,  # or a complete config
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
        expert: str = DEFAULT_EXPERT,  # of two
    ):
        super(WanTransformer3DModel, self).__init__()  # the stock __init__ builds stock blocks
        self.__module__ = WanTransformer3DModel.__module__  # see below the class
        if isinstance(hidden_size, Mapping):
            return self.__init__(
                **{
                    "teacher_checkpoint_path": teacher_checkpoint_path,
                    "projection": projection,
                    "expert": expert,
                    **student_arguments({**hidden_size}, config_defaults(type(self))),
                }
            )
        shape = {
            "hidden_size": hidden_size,
            "depth": depth,
            "num_heads": num_heads,
            "ffn_dim": ffn_dim or 4 * hidden_size,
            "num_channels": num_channels,
            "text_dim": text_dim,
            "freq_dim": freq_dim,
            "patch_size": patch_size,
            "cross_attn_norm": cross_attn_norm,
            "qk_norm": qk_norm,
            "eps": eps,
            "rope_max_seq_len": rope_max_seq_len,
        }
        check_shape(**shape)
        self.register_to_config(**complete_config(shape))
        add_layers(self)
        if not self.proj_out.weight.is_meta:
            initialize_weights(self)
        if teacher_checkpoint_path is not None and projection != "none":
            project_into(self, teacher_checkpoint_path, expert)

    @apply_lora_scale("attention_kwargs")
    def forward(
        self,
        hidden_states: torch.Tensor,  # (B, C, H, W), or (B, C, 1, H, W) from a pipeline
        timestep: torch.Tensor,  # (B,) in 0..1000, or (B, N) with equal rows
        encoder_hidden_states: torch.Tensor | TextTokens,  # (B, L, T)
        encoder_hidden_states_image: torch.Tensor | None = None,
        return_dict: bool = True,
        attention_kwargs: dict | None = None,
        text_logit_bias: torch.Tensor | None = None,  # (B, L); None: every token counts once
        feature_blocks: tuple[int, ...] = (),
    ) -> StudentOutput | tuple:
        """Return the velocity in the shape of `hidden_states`, and the hidden states after `feature_blocks`."""
        is_video = hidden_states.ndim == 5
        if is_video and hidden_states.shape[2] != 1:
            raise ValueError(
                f"latents have {hidden_states.shape[2]} frames; the student generates single frames: num_frames=1."
            )
        if encoder_hidden_states_image is not None:
            raise ValueError(
                "encoder_hidden_states_image is not supported by a text-to-image student. Leave it out."
            )
        latents = hidden_states.squeeze(2) if is_video else hidden_states
        self._check_size(*latents.shape[-2:])
        if isinstance(encoder_hidden_states, TextTokens):
            encoder_hidden_states, text_logit_bias = encoder_hidden_states
        if timestep.ndim == 2:
            if (timestep != timestep[:, :1]).any():
                raise ValueError(
                    "timesteps differ between the tokens of an image; the student takes one per image: (B,)."
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
        """Raise ValueError for latents that do not divide into patches or exceed the rotary tables."""
        for name, size, patch in zip(("high", "wide"), (height, width), self.config.patch_size[1:]):
            if size % patch or size // patch > self.config.rope_max_seq_len:
                raise ValueError(
                    f"latents are {size} {name}, expected a multiple of {patch} up to "
                    f"{patch * self.config.rope_max_seq_len}, the size of this student's rotary tables. "
                    "Choose another height or width."
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
        """Save config and weights atomically.

        All ranks may call it; if `is_main_process` is None, rank 0 writes. `save_function` is accepted and not
        used; `kwargs` are those of push_to_hub. Raises ValueError for weights that could not be loaded again:
        not finite, on the meta device, or with an adapter.
        """
        if kwargs and not push_to_hub:
            raise TypeError(
                f"WanLiteStudent.save_pretrained does not take {', '.join(sorted(kwargs))} without push_to_hub."
            )
        check_save_options(save_directory, safe_serialization, variant, max_shard_size)
        is_written = write_student(self, save_directory, is_main_process, variant, max_shard_size)
        if is_written and push_to_hub:
            self.push_to_hub(kwargs.pop("repo_id", Path(save_directory).name), variant=variant, **kwargs)

    def to_json_string(self) -> str:
        """Return the config of a stock Wan; stock diffusers would warn of our names for the same settings."""
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
        """Load a single weights file with the key names of diffusers or Wan; `config` is the folder of config.json."""
        if config is None:
            raise ValueError(
                "config is missing, expected the folder of the student's config.json: weights do not contain it."
            )
        try:
            return super().from_single_file(
                pretrained_model_link_or_path_or_dict, config=str(config), **kwargs
            )
        except NotImplementedError:  # stock moves a tensor of the meta device
            raise ValueError(
                f"{pretrained_model_link_or_path_or_dict}: lacks tensors of the student that {config} "
                "describes. Name the file and the config of one student."
            ) from None

    @classmethod
    def extract_init_dict(cls, config_dict: Mapping, **kwargs):
        """Convert a config with our names, Wan's or both to arguments.

        The stock method would use our defaults for settings under Wan's names.
        """
        return super().extract_init_dict(
            student_arguments({**config_dict}, config_defaults(WanLiteStudent)), **kwargs
        )

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
        quantization_config: Any = None,
        **unknown: Any,
    ) -> Any:  # a WanLiteStudent; with `output_loading_info` a pair, as in diffusers
        """Load a saved student from a folder or the hub, in eval mode, by default on the CPU; nothing is projected.

        `dtype` (or `torch_dtype`), a torch.dtype or its name, does not apply to the modules that Wan keeps in
        float32; None keeps all dtypes as saved. `sha256` is the expected digest of the weights, or {file name:
        digest}. With it, or with `output_loading_info`, which contains the digests, weights are hashed while they
        are read. They are read into memory once, for any `low_cpu_mem_usage` and `disable_mmap`: a student does
        not change with its file. `quantization_config` is one of diffusers. Raises OSError for files that are
        missing or broken, and ValueError for content that is not this student's.
        """
        accepted = list(inspect.signature(cls.from_pretrained).parameters)[1:-1]
        refuse_unknown(unknown, accepted, cls._left_to_stock)
        if use_safetensors is False:
            raise ValueError(
                "use_safetensors=False requests a pickle, and pickles are never opened. Leave it out."
            )
        options = ReadOptions(
            dtype=as_dtype(torch_dtype if dtype is None else dtype),
            device=as_device(device_map if device is None else device),
            is_hashed=output_loading_info,
            sha256=sha256,
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
        arguments, tensors, digests = read_student(cls, folder, variant, options)
        student = build_student(cls, arguments, tensors, options.device)
        if quantization_config is not None:
            quantize(student, quantization_config)
        student.register_to_config(_name_or_path=str(pretrained_model_name_or_path))
        return (student, make_loading_info(digests)) if output_loading_info else student


# A saved student is also a stock Wan: pipelines save the names of a component's class and module, and load the
# component by these names on machines without this file.
WanLiteStudent.__name__ = WanTransformer3DModel.__name__


# ---- the dry run -------------------------------------------------------------------------------------------


def plan(settings, arguments):
    """Print the plan of a run, its memory, disk and time, and its problems, without writing anything.

    `arguments` are those of the command line. Returns the exit code: 0 if the run fits, else 2.
    """
    run = resolve_run(settings, WanLiteStudent)
    warn_of_long_prompts(run)
    announce(run, print)
    report = run.report_memory()
    print("\n".join(report.describe()))
    problems = report.find_problems()
    print(labelled("time", run.estimate_time(is_trained=not settings.project_only)))
    try:
        is_interrupted(settings)
    except (OSError, ValueError) as error:
        problems.append(str(error))
    for problem in problems:
        print(f"PROBLEM  {problem}")
    print(f"run      {command(Path(__file__).name, *arguments)}")
    return 2 if problems else 0


def arguments_of_run(arguments):
    """Return the arguments of a dry run without those of the dry run itself."""
    return without_flags(["plan_for"], [each for each in arguments if each != "--dry_run"])


def warn_of_long_prompts(run):
    """Print the prompts that the text encoder truncates."""
    # A prompt with fewer bytes than TEXT_LENGTH is never truncated.
    long = [prompt for prompt in run.prompts if len(prompt.encode()) >= TEXT_LENGTH]
    if long and run.components["tokenizer"].is_dir():
        warn_of_truncation(load_tokenizer(run.components["tokenizer"]), long, print)


# ---- a run -------------------------------------------------------------------------------------------------


def train(
    settings,
    is_resumed,
    stop,
    phases=PHASES,  # {name: PhaseDefinition}
    make_accelerator=Accelerator,
    make_validator=Validator,
    prefetched=None,  # micro-batches read ahead
):
    """Project, generate trajectories, distil, validate and save into settings.output_dir.

    Raises Stopped after a signal that `stop`, a StopSignal, catches, and OSError or ValueError for a run that
    cannot be trained.
    """
    began = time.time()
    check_devices(os.environ)
    run = resolve_run(settings, WanLiteStudent, is_resumed, partial(start_processes, make_accelerator))
    set_seed(run.settings.seed)
    student = WanLiteStudent(run.shape)
    facts = run.describe() | {"report": describe_for_report(run, sys.argv[1:])}
    check_run(run, facts, is_resumed)
    components_folder, prompt_embeddings, autoencoder = load_components(run)
    announce_work(run)
    lock_output(run)
    facts["projection"] = project_student(run, student, prompt_embeddings)
    if run.settings.project_only:
        return save_projected_student(run, student, components_folder, facts)
    teacher_data, generation = generate_teacher_data(run, prompt_embeddings, autoencoder)
    few = make_few_steps(run)
    validators = make_validators(run, teacher_data, few, autoencoder, stop, make_validator)
    begin_output(run, facts, is_resumed)
    state = build_state(run, student, teacher_data, few, stop)
    if is_resumed:
        state.resume(run.settings.output_dir, run.device, run.accelerator.print)
    log = start_log(run, facts, state, teacher_data.pace, began, generation)
    stop.is_immediate = False  # from now on, a stop waits for a checkpoint
    distil(run, state, phases_to_train(run, phases), teacher_data, validators, log, prefetched)
    stop.is_immediate = True  # a resumed run repeats the code below from the last checkpoint
    stop.check()
    finish(run, state, validators[-1], log, components_folder)


def distil(run, state, phases, teacher_data, validators, log, prefetched=None):
    """Train the student through the phases; raises Stopped after saving a checkpoint of the last step.

    `validators` has one for each resolution.
    """
    settings, progress = run.settings, state.progress
    try:
        for phase in phases:
            if progress.step >= phase.last or progress.rejected_validations >= PATIENCE:
                continue
            state.begin(phase, run.accelerator)
            if progress.step == run.base_step:
                save_base_weights(run, state)
            validator = validators[phase.resolution]
            with micro_batches(phase, run, state, teacher_data, prefetched) as batches:
                if phase.name != "matching":
                    teacher_data.teacher.unload()  # its predictions are cached
                if is_validation_due(progress, settings):
                    validator(state, log)
                while progress.step < phase.last:
                    batch = islice(batches, phase.accumulation)
                    step_figures = training_step(phase, run, state, batch)
                    log.record_step(phase, state, step_figures)
                    if is_validation_due(progress, settings):
                        validator(state, log)
                    if is_checkpoint_due(progress, settings):
                        log.checkpoint(state)
                    if progress.rejected_validations >= PATIENCE:
                        break
    except Stopped:
        log.bar.close()
        log.checkpoint(state)
        run.accelerator.end_training()
        print_above(run.accelerator, f"stopped at step {progress.step} of {settings.max_train_steps}")
        raise
    log.bar.close()
    if progress.step < settings.max_train_steps:
        print_above(
            run.accelerator,
            f"ended at step {progress.step}: {PATIENCE} validations in a row were rejected and not closer to "
            "the teacher",
        )


def is_validation_due(progress, settings):
    """Whether a validation of the current step is due; the last step is validated after the loop."""
    step = progress.step
    is_validated = progress.last_validation.get("step") == step
    return step % settings.validation_steps == 0 and step < settings.max_train_steps and not is_validated


def is_checkpoint_due(progress, settings):
    """Whether a checkpoint of the current step is due."""
    return progress.step % settings.checkpointing_steps == 0 or progress.step == settings.max_train_steps


# ---- before the loop, in this order ------------------------------------------------------------------------


def start_processes(make_accelerator, settings):
    """Return the Accelerator of a run; the mixed precision of `settings` is resolved."""
    output = Path(settings.output_dir)
    accelerator = make_accelerator(
        kwargs_handlers=[process_group_options()],
        mixed_precision=settings.mixed_precision,
        log_with=None if settings.report_to == "none" else settings.report_to,
        project_config=ProjectConfiguration(
            project_dir=str(output), logging_dir=str(output / settings.logging_dir)
        ),
    )
    prepare_device(settings)
    return accelerator


def prepare_device(settings):
    """Choose the kernels of a run, which are those of the whole process."""
    disable_cudnn_attention()
    hide_loading_bars()
    if settings.deterministic:
        use_deterministic_kernels()


def check_run(run, facts, is_resumed):
    """Print the plan; raises OSError or ValueError for a run that cannot resume or fit, or for invalid experts."""
    settings, accelerator = run.settings, run.accelerator
    if is_resumed:
        check_resumable(settings.output_dir, facts, accelerator.print)
    announce(run, accelerator.print)
    problems = []
    if accelerator.is_main_process:
        report = run.report_memory()
        problems = report.find_problems()
        if is_large(run.files):
            print("\n".join(report.describe()))
    abort_all_ranks(accelerator, "\n".join(problems))
    if accelerator.is_main_process and not is_resumed:
        compare_experts(settings, run.files, run.device)


def load_components(run):
    """Return the folder of components in diffusers' layout, the embeddings of all prompts, and the autoencoder."""
    folder = open_components(run)
    prompt_embeddings = PromptEmbeddings(run.accelerator, folder, run.settings.cache_dir, run.prompts)
    return folder, prompt_embeddings, load_autoencoder(folder, device=run.device)


def announce_work(run):
    """Print the estimated time of the run and, with aspect ratios, its image sizes."""
    if not run.settings.project_only:
        run.accelerator.print(labelled("time", run.estimate_time(is_calibrated=False)))
    if run.settings.aspect_ratios:
        sizes = ", ".join(f"{width} x {height}" for width, height in run.resolutions[-1].buckets)
        run.accelerator.print(labelled("sizes", sizes))


def lock_output(run):
    """Lock --output_dir until the process ends; raises an error on all ranks if another run holds the lock."""
    output = Path(run.settings.output_dir)
    (output / CACHE).mkdir(exist_ok=True)
    is_locked_by_other = run.accelerator.is_main_process and lock(output / CACHE) is None
    abort_all_ranks(run.accelerator, locked_message(output) if is_locked_by_other else None)


def locked_message(output):
    """Return the error of a folder that another run has locked."""
    return f"{output}: another run is writing there. Wait for it, or name another --output_dir."


def project_student(run, student, prompt_embeddings):
    """Initialize the student's weights; returns the report for run.json."""
    prompts = run.training[: max_calibration_frames(run.estimator.tokens)]
    return initialize_student(
        run.settings,
        student,
        run.files,
        prompt_embeddings,
        prompts,
        run.resolutions[-1].latent_shape[1:],
        run.accelerator,
    )


def make_teacher_data(run, prompt_embeddings):
    """Return the TeacherData of a run, before any trajectory is generated."""
    settings, dtype = run.settings, training_dtype(run.settings)
    teacher = Teacher(
        run.files,
        run.device,
        dtype,
        settings.teacher_residency,
        settings.teacher_fp8,
        is_compiled=bool(settings.compile) and run.device.type == "cuda",
    )
    pace = Pace(run.device, measure_matrix_rate(run.device, dtype), run.accelerator.num_processes)
    return TeacherData(run, teacher, prompt_embeddings, pace)


def generate_teacher_data(run, prompt_embeddings, autoencoder):
    """Return the TeacherData of a run with its trajectories, and figures of their generation, {} if all were cached."""
    teacher_data = make_teacher_data(run, prompt_embeddings)
    figures = teacher_data.generate(run, autoencoder)
    if figures:
        run.accelerator.print(
            "generated {generated:,} trajectories, {trajectories_per_second:.3g} a second, "
            "{generation_teacher_share:.0%} of the time in the teacher".format(**figures)
        )
    return teacher_data, figures


def make_few_steps(run):
    """Return the FewSteps of a run."""
    settings, accelerator = run.settings, run.accelerator
    return FewSteps(
        settings.flow_shift,
        run.few_steps or [settings.num_inference_steps],
        run.resolutions[-1].latent_shape,
        settings.teacher_steps,
        (accelerator.process_index, accelerator.num_processes),
    )


def make_validators(run, teacher_data, few, autoencoder, stop, make_validator):
    """Return a Validator for each resolution."""
    check = make_check(run, stop)
    return [
        make_validator(run, teacher_data, few, autoencoder, check, number)
        for number in range(len(run.resolutions))
    ]


def make_check(run, stop):
    """Return the function that a validation calls between batches."""
    # Several processes stop after the same step, never within a validation.
    return stop.check if run.accelerator.num_processes == 1 else lambda: None


def begin_output(run, facts, is_resumed):
    """Replace the results of an earlier run by the record of this one, after everything that may fail early."""
    output, accelerator = Path(run.settings.output_dir), run.accelerator
    if accelerator.is_main_process:
        if not is_resumed:
            clear(output)
        write_json(output / RUN, facts)
    accelerator.wait_for_everyone()
    if not (output / RUN).exists():
        raise OSError(
            f"{output}: rank 0 wrote {RUN}, which is missing on this machine. All machines of a run need one "
            "shared disk under --output_dir."
        )


def build_state(run, student, teacher_data, few, stop):
    """Return the TrainingState at step 0, which does not depend on the content of the cache."""
    set_seed(run.settings.seed)  # again, because a run with a full cache uses fewer random numbers
    if (
        run.settings.allow_tf32 and run.device.type == "cuda"
    ):  # not earlier: the projection needs full float32
        torch.set_float32_matmul_precision("high")
    state = make_training_state(run, student, teacher_data, few, stop)
    trained = [network for network in (state.student, state.critic) if network is not None]
    for network in trained:
        teacher_data.pace.count_operations(network)
    if run.settings.compile:
        compile_blocks(trained)
    return state


def start_log(run, facts, state, pace, began, generation):
    """Return the RunLog of a run, with a first record of the figures of `generation`, if there are any."""
    log = RunLog(run, facts, state.progress.step, pace, began)
    if generation:
        log.record(state.progress.step, **generation)
    return log


# ---- after the loop ----------------------------------------------------------------------------------------


def finish(run, state, validator, log, components_folder):
    """Save the best averaged student, the components for inference, and the results."""
    settings, progress, output = run.settings, state.progress, Path(run.settings.output_dir)
    if progress.last_validation.get("step") != progress.step:
        validator(state, log)
    state.load_best()
    is_main = run.accelerator.is_main_process
    if is_main:
        state.student.save_pretrained(output)
        save_components(output, components_folder, validator.scheduler)
        complete_base(run, log.facts)
    figures = progress.best.get("figures", progress.last_validation)
    results = {name: value for name, value in figures.items() if name != "step"}
    if validator.teacher_data.teacher.residency == "sharded" or is_main:  # all processes hold shards
        results |= validator.judge(state.student)
    if is_main:
        chosen = describe_chosen(progress)
        facts = {"finished": True, "steps": progress.step, "minutes": log.seconds / 60}
        facts |= {"skipped_steps": progress.skipped_steps, "chosen": chosen, "results": results}
        facts = log.facts | facts | {"model_sha256": model_digest(output)}
        facts["verdict"] = judge_run(read_history(output, facts))._asdict()
        write_json(output / RUN, seal(facts))
        write_model_card(output, settings, run.few_steps, results, drawing_command(settings.output_dir))
        log.write_report()
        conclude(facts, settings, log.seconds, run.accelerator.print)
        if settings.push_to_hub is not None and not makes_parts(settings):
            publish(output, settings.push_to_hub, run.accelerator.print)
    run.accelerator.end_training()


def save_base_weights(run, state):
    """Save the averaged student at the end of the velocity phase: LoRAs are trained on it."""
    if run.accelerator.is_main_process:
        with state.averaged() as student:
            student.save_pretrained(Path(run.settings.output_dir) / BASE)


def complete_base(run, facts):
    """Make base/ a folder like --output_dir; its components are hard links."""
    base = Path(run.settings.output_dir) / BASE
    if not base.is_dir():
        return
    settings = replace(
        run.settings, output_dir=str(base), num_inference_steps=run.settings.teacher_steps, few_steps=[]
    )
    phases = [span for span in run.phases if span.name == "velocity"]
    save_components(base, run.settings.output_dir, make_scheduler(settings.flow_shift), link_file)
    base_facts = {
        "num_inference_steps": settings.num_inference_steps,
        "schedule": describe_schedule(settings, [], phases),
        "steps": run.base_step,
        "finished": True,
    }
    write_json(base / RUN, seal(facts | base_facts))
    write_model_card(base, settings, [], {}, drawing_command(str(base)))


def describe_chosen(progress):
    """Return the saved step and the reason for it, for run.json."""
    if not progress.best:
        return {
            "step": progress.step,
            "kept": describe_kept(progress.step, is_close=False),
            "why": "the last step, because all validations were rejected",
        }
    return {
        "kept": describe_kept(progress.best["step"], is_close=True),
        "step": progress.best["step"],
        MEASURE: progress.best["score"],
        "why": f"the lowest {MEASURE} of the accepted validations of phase {progress.best['phase']}",
    }


def save_projected_student(run, student, components_folder, facts):
    """Save a projected, untrained student, with the schedule of the velocity phase."""
    settings, output = run.settings, Path(run.settings.output_dir)
    if not run.accelerator.is_main_process:
        return run.accelerator.end_training()
    clear(output)
    facts = facts | {"projected_only": True, "schedule": describe_schedule(settings, [], [])}
    write_json(output / RUN, facts)
    student.save_pretrained(output)
    save_components(output, components_folder, make_scheduler(settings.flow_shift))
    drawing = drawing_command(settings.output_dir)
    write_model_card(output, settings, [], {}, drawing)
    print(f"saved to {output}, projected and not trained\nnext: {drawing}")
    if settings.push_to_hub is not None:
        publish(output, settings.push_to_hub, print)
    run.accelerator.end_training()


# ---- small parts -------------------------------------------------------------------------------------------


def make_parts(settings, stop):
    """Save the trained student of --output_dir with small parts in a folder inside, and record their figures.

    Raises Stopped after a checkpoint, from which the same command continues.
    """
    release_memory()  # of the training
    prepare_device(settings)
    output = Path(settings.output_dir)
    facts, device = read_run(output), torch.device("cuda" if has_gpu() else "cpu")
    vocabulary = read_vocabulary(settings.vocabulary, print)
    student = TrainedStudent(output, WanLiteStudent, device, *choose_prompts(settings), vocabulary=vocabulary)
    num_before = len({phase["name"] for phase in facts["report"]["phases"]})
    with alone(output / SMALL):  # wanlite.small writes there, too
        made = make_folder(output / SMALL, student, settings, stop, num_before)["parts"]
    write_json(output / RUN, facts | {SMALL: {"folder": SMALL} | made})
    try_report(output, print)
    print(describe_folder(output / SMALL, output, made["figures"]))
    print(f"next: {drawing_command(str(output / SMALL))}")
    if settings.push_to_hub is not None:
        publish(output, settings.push_to_hub, print)


def is_trained(settings, is_resumed):
    """Whether a run that continues lacks its small parts only; rank 0, which makes them, then locks --output_dir."""
    output = Path(settings.output_dir)
    if not is_resumed or not read_run(output).get("finished"):
        return False
    if not is_first():
        return True
    (output / CACHE).mkdir(exist_ok=True)
    if lock(output / CACHE) is None:
        raise OSError(locked_message(output))
    return True


# ---- main --------------------------------------------------------------------------------------------------


def resuming_command(settings):
    """Return the command that resumes this run; flags that would start it again are reverted."""
    arguments = sys.argv[1:]
    with suppress(OSError, ValueError):
        if is_interrupted(replace(settings, overwrite=False, resume_from_checkpoint="latest")):
            arguments = resuming_arguments(settings, arguments)
    return command(Path(__file__).name, *arguments)


def main(settings, is_resumed, **replacements):
    """Train in --output_dir, or print the plan of a dry run; returns the exit code.

    `replacements` are the arguments of train() that replace its components, for benchmarks and tests.
    """
    try:
        if settings.dry_run:
            return plan(settings, arguments_of_run(sys.argv[1:])) if is_first() else 0
        stop = StopSignal(is_launched=is_launched())
        if not is_trained(settings, is_resumed):
            train(settings, is_resumed, stop, **replacements)
        if makes_parts(settings) and is_first():
            make_parts(settings, stop)
    except EXPLAINED as error:
        defer_to_rank_zero()
        print_error("train_distillation.py", error)
        return EXIT_CODE
    except torch.OutOfMemoryError as error:
        print(
            f"train_distillation.py: {str(error).splitlines()[0]} The teacher's trajectories are kept. End other "
            "programs on the device, or add --overwrite and a lower --train_batch_size with more "
            "--gradient_accumulation_steps, --gradient_checkpointing, or --teacher_residency disk.",
            file=sys.stderr,
        )
        return 2
    except RuntimeError as error:
        if not (is_launched() and is_peer_failure(error)):
            raise
        print(
            f"train_distillation.py: another process of this run ended ({str(error).splitlines()[0]}). "
            "Its output or the log of its machine shows the reason; the same command resumes from the newest "
            "checkpoint.",
            file=sys.stderr,
        )
        return 2
    except Stopped:
        if is_first():
            print(f"stopped; resume with: {resuming_command(settings)}", file=sys.stderr)
        return STOPPED
    return 0


if __name__ == "__main__":
    gc.freeze()  # the garbage collector skips the objects of imports
    gc.enable()
    sys.exit(main(SETTINGS, IS_RESUMED))
