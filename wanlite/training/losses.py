"""Losses of distillation, pure functions of tensors; every one returns a value per image (B,).

Legend: B batch, C channels, H W latent height and width, N image tokens, D feature width.
"""

from ..flow import clean_from


def velocity_loss(student_velocity, teacher_velocity):
    """Match the teacher's guided velocity, so that guidance is baked into the student.

    Shapes: both (B, C, H, W). Source: velocity distillation as in SnapGen++ and BK-SDM, in float32.
    """
    return (student_velocity.float() - teacher_velocity.float()).square().flatten(1).mean(1)


def feature_loss(student_features, teacher_features, outlier=2.0):
    """Match the teacher's token states, seen in the student's basis, leaving out what lies beyond `outlier`
    deviations.

    Shapes: both (B, N, D). Teacher states are scaled to unit power per image, the student's by the same
    factor. Source: TinyFusion (Fang et al. 2024), masked representation distillation.
    """
    student_features, teacher_features = student_features.float(), teacher_features.float()
    scale = teacher_features.square().mean((1, 2), keepdim=True).clamp(min=1e-8).rsqrt()  # (B, 1, 1)
    typical = (teacher_features * scale).abs() <= outlier
    error = ((student_features - teacher_features) * scale).square() * typical
    return error.sum((1, 2)) / typical.sum((1, 2)).clamp(min=1)


def push_apart(velocity, image, other_noise, other_velocity, noise_level, gain):
    """Return the velocity to a image that lies farther from others of its prompt, by `gain` of the
    distance.

    A regression draws the mean of what it cannot tell from the noise, and so its images of a prompt differ
    less than the teacher's. `velocity` leads to the teacher's `image`; `other_velocity` is the student's,
    of the same prompt from `other_noise`, all at `noise_level` (B,); shapes (B, C, H, W). What the student
    draws from other noise is on average the prompt's mean image: moving away from it leaves the mean where
    it is and lets what deviates from it grow.
    """
    other = clean_from(other_noise, other_velocity.float(), noise_level)
    return velocity + gain * (other - image) / noise_level.view(-1, 1, 1, 1)


def distribution_matching_loss(sample, noisy, noise_level, teacher_velocity, critic_velocity):
    """Push samples where the teacher finds them likelier than the critic, which knows what the student draws.

    `noisy` is the sample renoised to `noise_level` (B,), the velocities are what both say there; shapes (B,
    C, H, W). The gradient reaches `sample` only: what the critic sees minus what the teacher sees, over the
    sample's mean distance from the latter. Source: DMD (Yin et al. 2023), equations 7 and 8, in float32.
    """
    teacher_clean, critic_clean = (
        clean_from(noisy, velocity.float(), noise_level) for velocity in (teacher_velocity, critic_velocity)
    )
    distance = (sample.detach() - teacher_clean).abs().flatten(1).mean(1).clamp(min=1e-6).view(-1, 1, 1, 1)
    aim = sample.detach() - (critic_clean - teacher_clean) / distance
    return 0.5 * (sample - aim.detach()).square().flatten(1).mean(1)
