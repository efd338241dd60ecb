"""The training state: networks, optimizers, schedules, averaged weights and progress, saved and restored as one.

`Progress` is plain JSON. `CHECKPOINTED` names the attributes of a TrainingState that a checkpoint holds.
"""

import copy
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from diffusers.training_utils import EMAModel
from torch import nn

from ..network import use_cudnn_self_attention
from ..runtime.devices import capability_of, prefers_cudnn_attention
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
    """Replace a network's weights by their average within the context."""
    ema.store(network.parameters())
    ema.copy_to(network.parameters())
    try:
        yield
    finally:
        ema.restore(network.parameters())


@dataclass
class Progress:
    """The progress of a run, in types of JSON."""

    step: int = 0
    phase: str = ""
    skipped_steps: int = 0
    skipped_in_a_row: int = 0
    rejected_validations: int = 0  # in a row, none closer to the teacher
    best: dict[str, Any] = field(default_factory=dict)  # step, score and figures of the best candidate
    last_validation: dict[str, Any] = field(default_factory=dict)
    rollout: dict[str, Any] = field(default_factory=dict)  # first step of the phase, digest of the student
    early_losses: list[float] = field(default_factory=list)  # of the first steps; see halve_rates_if_rising()

    def state_dict(self):
        return asdict(self)

    def load_state_dict(self, state):
        for name in asdict(self):
            setattr(self, name, state[name])


@dataclass
class TrainingState:
    """Everything that training updates; `networks` holds student and critic as wrapped by accelerate."""

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
    stop: Any = None  # a StopSignal, checked in every step
    is_stopping: bool = False  # a process received a signal to stop

    @property
    def critic_optimizers(self):
        return self.networks.critic_optimizers

    @contextmanager
    def averaged(self):
        """Yield the student with its averaged weights, if the run keeps an average."""
        with averaged_weights(self.ema, self.student) if self.ema else nullcontext():
            yield self.student

    def begin(self, phase, accelerator):
        """Prepare for a phase; the critic of the matching phase starts as a copy of the student."""
        self.progress.phase = phase.name
        accelerator.gradient_accumulation_steps, accelerator.step = phase.accumulation, 0
        if self.critic is not None and phase.name == "matching" and self.progress.step == phase.first:
            self.critic.load_state_dict(self.student.state_dict())

    def keep_as_best(self, score, figures):
        """Keep the current weights of the student as the best candidate."""
        self.progress.best = {
            "step": self.progress.step,
            "phase": self.progress.phase,
            "score": score,
            "figures": figures,
        }
        self.best_weights = {
            name: tensor.detach().cpu().clone() for name, tensor in self.student.state_dict().items()
        }

    def load_best(self):
        """Load the best candidate into the student or, without one, the averaged weights."""
        if self.best_weights:
            self.student.load_state_dict(self.best_weights)
        elif self.ema is not None:
            self.ema.copy_to(self.student.parameters())

    # ---- checkpoints ---------------------------------------------------------------------------------------

    def checkpointed(self):
        """Return the attributes of CHECKPOINTED by name; those that this run does not use are left out."""
        components = {name: getattr(self, name) for name in CHECKPOINTED}
        return {name: value for name, value in components.items() if value is not None and value != []}

    def save(self, folder, facts, keep):
        """Save a checkpoint of the current step; see save_checkpoint()."""
        save_checkpoint(folder, self.progress.step, self.checkpointed(), facts, keep)

    def resume(self, folder, device, log):
        """Restore the newest valid checkpoint; without any checkpoint, nothing changes."""
        path, skipped = latest_checkpoint(folder)
        for reason in skipped:
            log(reason)
        if path is None:
            if skipped:
                raise OSError(
                    f"{folder}: no checkpoint is valid, so nothing can be resumed. Add --overwrite to start again."
                )
            return
        components = self.checkpointed()
        restore(components, load_checkpoint(path))
        self.best_weights = components["best_weights"]
        if self.ema is not None:
            self.ema.to(device)
        log(f"resumed at step {self.progress.step} from {path}")


def make_training_state(run, student, teacher_data, few, stop=None):
    """Return the TrainingState at step 0 of `student`, with the teacher of `teacher_data`."""
    settings, accelerator = run.settings, run.accelerator
    is_fused = accelerator.device.type == "cuda"
    student = student.to(accelerator.device)
    head = nn.Linear(run.shape["hidden_size"], settings.feature_directions).to(accelerator.device)
    if settings.gradient_checkpointing:
        student.enable_gradient_checkpointing()
    if prefers_cudnn_attention(capability_of(accelerator.device)):
        use_cudnn_self_attention(student)
    optimizers = make_optimizers(settings, student, head, is_fused=accelerator.device.type in ("cpu", "cuda"))
    lr_schedulers = make_lr_schedulers(settings, optimizers, run.phases)
    ema = (
        EMAModel(student.parameters(), decay=settings.ema_decay, foreach=is_fused)
        if settings.use_ema
        else None
    )
    # Optimizers are prepared as well, so that accelerate unscales their gradients.
    wrapped, wrapped_head, *_ = accelerator.prepare(student, head, *optimizers)
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
