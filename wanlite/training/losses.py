"""Losses of distillation: pure functions of tensors that return one value per image (B,).

Legend: B batch, C channels, H W latent height and width, N image tokens, D feature width.
"""

from torch import Tensor

from ..flow import clean_from


def velocity_loss(student_velocity: Tensor, teacher_velocity: Tensor) -> Tensor:
    """Match the teacher's guided velocity, so that guidance is baked into the student.

    Shapes: both (B, C, H, W). Source: velocity distillation as in SnapGen++ and BK-SDM, in float32.
    """
    return (student_velocity.float() - teacher_velocity.float()).square().flatten(1).mean(1)


def feature_loss(student_features: Tensor, teacher_features: Tensor, outlier: float = 2.0) -> Tensor:
    """Match the teacher's hidden states in the student's basis, ignoring values beyond `outlier` deviations.

    Shapes: both (B, N, D). The teacher's are scaled to unit power per image, the student's by the same factor.
    Source: TinyFusion (Fang et al. 2024), masked representation distillation.
    """
    student_features = student_features.float()
    teacher_features = teacher_features.float()
    scale = teacher_features.square().mean((1, 2), keepdim=True).clamp(min=1e-8).rsqrt()  # (B, 1, 1)
    typical = (teacher_features * scale).abs() <= outlier
    error = ((student_features - teacher_features) * scale).square() * typical
    return error.sum((1, 2)) / typical.sum((1, 2)).clamp(min=1)


def push_apart(
    velocity: Tensor,
    image: Tensor,
    other_noise: Tensor,
    other_velocity: Tensor,
    noise_level: Tensor,
    gain: float,
) -> Tensor:
    """Return the velocity to an image that is moved away from another of its prompt by `gain` times the distance.

    A regression predicts the mean over everything that the noise does not determine, so its images of a
    prompt differ less than the teacher's. Moving a target away from the student's image from other noise
    keeps the mean over a prompt and enlarges the deviations from it. `velocity` leads to the teacher's
    `image`; `other_velocity` is the student's for the same prompt and `other_noise`. Shapes: (B, C, H, W),
    `noise_level` (B,).
    """
    other = clean_from(other_noise, other_velocity.float(), noise_level)
    return velocity + gain * (other - image) / noise_level.view(-1, 1, 1, 1)


def distribution_matching_loss(
    sample: Tensor, noisy: Tensor, noise_level: Tensor, teacher_velocity: Tensor, critic_velocity: Tensor
) -> Tensor:
    """Push samples towards regions that the teacher finds likelier than the critic, a model of the student's images.

    `noisy` is the sample renoised to `noise_level` (B,); both velocities are predictions at `noisy`. Shapes:
    (B, C, H, W). The gradient reaches `sample` only: the critic's clean image minus the teacher's, divided by
    the mean distance between the sample and the teacher's. Source: DMD (Yin et al. 2023), equations 7 and 8, in float32.
    """
    teacher_clean, critic_clean = (
        clean_from(noisy, velocity.float(), noise_level) for velocity in (teacher_velocity, critic_velocity)
    )
    distance = (sample.detach() - teacher_clean).abs().flatten(1).mean(1).clamp(min=1e-6).view(-1, 1, 1, 1)
    target = sample.detach() - (critic_clean - teacher_clean) / distance
    return 0.5 * (sample - target.detach()).square().flatten(1).mean(1)
