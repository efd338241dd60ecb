"""Shapes of a teacher, a student and a batch -> the bytes that each phase needs on the device.

Memory is not computed by formulas: a phase runs once, on tensors without contents, and the bytes alive at its
peak are counted. `peak(work)` runs it: simulate_peak(), or a function that measures.
Legend: B batch, C channels, H W latent height and width, N image tokens, D width.
"""

import torch
from torch import Size

from ..data.trajectories import count_compared
from ..teacher.model import make_expert, pinned_bytes
from .simulation import simulate_peak

LONG_PROMPT_TOKENS = 64


def count_teacher_bytes(files, residency, dtype, is_fp8, num_shares=1):
    """Return the bytes of a teacher's weights on the device and in CPU memory.

    `num_shares` is the number of GPUs that a sharded teacher is split over.
    """
    itemsize = 1 if is_fp8 else dtype.itemsize
    sizes = [expert.num_parameters * itemsize for expert in files.experts.values()]
    if residency == "both":
        return sum(sizes), 0
    if residency == "one":
        return max(sizes), sum(sizes)
    block_parameters = [_count_block_parameters(expert) for expert in files.experts.values()]
    largest = max(block_parameters)
    block = largest // files.config["num_layers"] * dtype.itemsize
    others = max(sizes) - largest * itemsize
    if residency == "disk":  # a block is freed before the next is read; the other tensors of both stay
        return others * len(files.experts) + block, 0
    if residency == "sharded":
        share = sum(block_parameters) * dtype.itemsize // num_shares
        return len(sizes) * others + share + 2 * block, 0
    return others + 2 * block, sum(pinned_bytes(expert, dtype, is_fp8) for expert in files.experts.values())


def _count_block_parameters(expert):
    shapes = [shape for name, (*_, shape) in expert.places.items() if name.startswith("blocks.")]
    return sum(Size(shape).numel() for shape in shapes)


def count_pass_bytes(files, batch_size, latent_size, dtype, peak=simulate_peak):
    """Return the bytes of a pass of an expert on B latents of `latent_size` (H, W), without its weights."""
    weight_bytes = 0

    def run_pass():
        nonlocal weight_bytes
        # Two blocks: without gradients, the third needs only what the second needed.
        expert = make_expert(next(iter(files.experts.values())), 2)
        weight_bytes = sum(parameter.untyped_storage().nbytes() for parameter in expert.parameters())
        with torch.no_grad():
            expert(
                torch.zeros(batch_size, files.config["in_channels"], *latent_size),
                torch.zeros(batch_size),
                torch.zeros(batch_size, LONG_PROMPT_TOKENS, files.config["text_dim"]),
                torch.zeros(batch_size, LONG_PROMPT_TOKENS),
            )

    default_dtype = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # a network without contents cannot be cast
    try:
        return peak(run_pass) - weight_bytes
    finally:
        torch.set_default_dtype(default_dtype)


def count_trajectory_bytes(num_trajectories, num_steps, latent_shape, num_tokens, width, is_stored=True):
    """Return the bytes of trajectories: latents and velocities of each state, and features of some tokens.

    Without a `width` they have no features. On disk they are in int8, with a scale for each channel and each
    token; before that, latents and velocities are in float32 and features in float16.
    """
    num_values, num_compared = Size(latent_shape).numel(), count_compared(num_tokens) if width else 0
    if is_stored:
        state_bytes = 2 * (num_values + 4 * latent_shape[0]) + num_compared * ((width or 0) + 4) + 16
    else:
        state_bytes = 2 * 4 * num_values + num_compared * 2 * (width or 0)
    return num_trajectories * num_steps * state_bytes


def count_generation_bytes(pass_bytes, num_values, dtype, result_bytes):
    """Return the peak bytes of generating trajectories, without the teacher's weights.

    A step has `num_values` hidden values (trajectories x N x D). Those of earlier passes are in memory during
    a pass; then all are concatenated, and cast to float32 for the projection to features. At the end, the
    results of `result_bytes` are concatenated.
    """
    passing = pass_bytes + num_values * dtype.itemsize
    projecting = num_values * (2 * dtype.itemsize + 4)
    return max(result_bytes + max(passing, projecting), 2 * result_bytes)


def count_initialization_bytes(files, probe, num_frames, latent_size, peak=simulate_peak):
    """Return the bytes of comparing two experts and of calibrating on `num_frames` latents; 0 if skipped.

    `probe` is (batch size, latent size) of the comparison. Both are in float32, with one block of an expert
    in memory.
    """
    expert = next(iter(files.experts.values()))
    block_parameters = _count_block_parameters(expert)
    parameters = expert.num_parameters - block_parameters + block_parameters // files.config["num_layers"]
    expert_bytes = 4 * parameters
    compared = calibrated = 0
    if len(files.experts) > 1:
        batch_size, probe_size = probe
        compared = len(files.experts) * expert_bytes
        compared += count_pass_bytes(files, batch_size, probe_size, torch.float32, peak)
    if num_frames:
        calibrated = expert_bytes + count_pass_bytes(files, num_frames, latent_size, torch.float32, peak)
    return compared, calibrated


def count_training_bytes(
    make_student, make_optimizers, make_average, batch_size, latent_size, is_mixed, peak=simulate_peak
):
    """Return the bytes of training on B states: weights, their average, gradients, optimizers, activations."""

    def run_step():
        student = make_student()
        optimizers, average = make_optimizers(student), make_average(student)
        for parameter in student.parameters():
            parameter.grad = torch.zeros_like(parameter)
        for optimizer in optimizers:  # a first step allocates the state that later steps keep
            optimizer.step()
            optimizer.zero_grad()
        average.step(student.parameters())
        _run_backward(student, torch.zeros(batch_size, student.config.num_channels, *latent_size), is_mixed)

    return peak(run_step)


def _run_backward(student, latents, is_mixed):
    batch_size = len(latents)
    with torch.autocast(latents.device.type, torch.bfloat16, enabled=is_mixed):
        (velocity,) = student(
            latents,
            torch.zeros(batch_size),
            torch.zeros(batch_size, LONG_PROMPT_TOKENS, student.config.text_dim),
            text_logit_bias=torch.zeros(batch_size, LONG_PROMPT_TOKENS),
            return_dict=False,
        )
    (velocity.float() - latents).square().mean().backward()


def count_decoding_bytes(make_autoencoder, decode, batch_size, latent_shape, peak=simulate_peak):
    """Return the bytes of an autoencoder and of decoding B latents with `decode(autoencoder, latents)`."""

    def run_decoder():
        with torch.no_grad():
            decode(make_autoencoder(), torch.zeros(batch_size, *latent_shape))

    return peak(run_decoder)
