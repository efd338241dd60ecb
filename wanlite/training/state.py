"""What training changes: networks, optimizers, schedules, average and progress, as one state that is saved and restored.

`Progress` is plain JSON. `CHECKPOINTED` names the parts of a TrainingState that a checkpoint holds.
"""

import copy
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from diffusers.training_utils import EMAModel
from torch import nn

from .checkpoints import latest_checkpoint, load_checkpoint, restore, save_checkpoint
from .optimizers import make_lr_schedulers, make_optimizers
from .steps import Networks
from .teacher_data import feature_block

CHECKPOINTED = (
    "student",
    "feature_head",
    "critic",
    "ema",
    "optimizers",
    "critic_optimizers",
    "lr_schedulers",
    "scaler",
    "best_weights",
    "progress",
)


@contextmanager
def averaged_weights(ema, network):
    """Lend a network the average of its weights."""
    ema.store(network.parameters())
    ema.copy_to(network.parameters())
    try:
        yield
    finally:
        ema.restore(network.parameters())


@dataclass
class Progress:
    """How far a run has come, in values that JSON can hold."""

    step: int = 0
    phase: str = ""
    skipped_steps: int = 0
    rejected_validations: int = 0  # in a row, and no closer to the teacher
    best: dict[str, Any] = field(default_factory=dict)  # step, score and figures of the best candidate
    last_validation: dict[str, Any] = field(default_factory=dict)
    rollout: dict[str, Any] = field(default_factory=dict)  # first step of its phase, digest of its student

    def state_dict(self):
        return asdict(self)

    def load_state_dict(self, state):
        for name in asdict(self):
            setattr(self, name, state[name])


@dataclass
class TrainingState:
    """All that training changes. `networks` are the student and the critic as accelerate wraps them."""

    networks: Networks
    student: nn.Module
    feature_head: nn.Module
    ema: EMAModel | None
    optimizers: list
    lr_schedulers: list
    critic: nn.Module | None = None
    scaler: Any = None
    best_weights: dict[str, torch.Tensor] = field(default_factory=dict)
    progress: Progress = field(default_factory=Progress)
    stop: Any = None  # a StopSignal, which every step reads
    is_stopping: bool = False  # one of the processes was asked to stop
    skipped_in_a_row: int = 0

    @property
    def critic_optimizers(self):
        return self.networks.critic_optimizers

    @contextmanager
    def averaged(self):
        """Lend the student its averaged weights, where the run keeps an average."""
        with averaged_weights(self.ema, self.student) if self.ema else nullcontext():
            yield self.student

    def begin(self, phase):
        """Prepare for a phase: distribution matching starts with a critic that is a copy of the student."""
        self.progress.phase = phase.name
        if self.critic is not None and phase.name == "matching" and self.progress.step == phase.first:
            self.critic.load_state_dict(self.student.state_dict())

    def keep_as_best(self, score, figures):
        """Keep the weights that the student has now as the best candidate."""
        self.progress.best = {"step": self.progress.step, "score": score, "figures": figures}
        self.best_weights = {
            name: tensor.detach().cpu().clone() for name, tensor in self.student.state_dict().items()
        }

    def load_best(self):
        """Give the student the weights that are saved: of the best candidate, else the average at the last step."""
        if self.best_weights:
            self.student.load_state_dict(self.best_weights)
        elif self.ema is not None:
            self.ema.copy_to(self.student.parameters())

    # ---- checkpoints ---------------------------------------------------------------------------------------

    def checkpointed(self):
        """Return {name: part} of CHECKPOINTED, without those that this run does not have."""
        parts = {name: getattr(self, name) for name in CHECKPOINTED}
        return {name: part for name, part in parts.items() if part is not None and part != []}

    def save(self, folder, facts, keep):
        """Save a checkpoint of the current step; see save_checkpoint()."""
        save_checkpoint(folder, self.progress.step, self.checkpointed(), facts, keep)

    def resume(self, folder, device, say):
        """Restore the newest checkpoint that verifies; nothing changes where none was saved yet."""
        path, skipped = latest_checkpoint(folder)
        for reason in skipped:
            say(reason)
        if path is None:
            if skipped:
                raise OSError(
                    f"{folder}: no checkpoint verifies, so nothing can be resumed. Add --overwrite to start "
                    f"again."
                )
            return
        parts = self.checkpointed()
        restore(parts, load_checkpoint(path))
        self.best_weights = parts["best_weights"]
        if self.ema is not None:
            self.ema.to(device)
        say(f"resumed at step {self.progress.step} from {path}")


def make_training_state(run, student, teacher_data, few, stop=None):
    """Return the TrainingState at step 0 of `student`, whose teacher is that of `teacher_data`."""
    settings, accelerator = run.settings, run.accelerator
    is_fused = accelerator.device.type == "cuda"
    student = student.to(accelerator.device)
    head = nn.Linear(run.shape["hidden_size"], settings.feature_directions).to(accelerator.device)
    if settings.gradient_checkpointing:
        student.enable_gradient_checkpointing()
    optimizers = make_optimizers(settings, student, head, is_fused=is_fused)
    lr_schedulers = make_lr_schedulers(settings, optimizers)
    ema = (
        EMAModel(student.parameters(), decay=settings.ema_decay, foreach=is_fused)
        if settings.use_ema
        else None
    )
    wrapped, wrapped_head, *_ = accelerator.prepare(
        student, head, *optimizers
    )  # their gradients are unscaled
    networks = Networks(
        wrapped,
        wrapped_head,
        feature_block(run.shape["depth"]),
        teacher_data.guided,
        teacher_data.unguided,
        few,
    )
    state = TrainingState(networks, student, head, ema, optimizers, lr_schedulers, stop=stop)
    state.scaler = accelerator.scaler
    if settings.matching_steps:
        _add_critic(state, settings, accelerator)
    return state


def _add_critic(state, settings, accelerator):
    state.critic = copy.deepcopy(state.student)
    state.networks.critic_optimizers = make_optimizers(
        settings, state.critic, rate=settings.critic_learning_rate, is_fused=accelerator.device.type == "cuda"
    )
    state.networks.critic = accelerator.prepare(state.critic)


def compile_blocks(networks):
    """Compile networks block by block, in place: names and weights stay as they are."""
    torch._dynamo.config.optimize_ddp = False  # it would cut each block where gradients are sent
    torch._dynamo.config.recompile_limit = 32  # sizes, lengths of text, with gradients and without
    for network in networks:
        network.compile_repeated_blocks()
