"""Losses of distillation, pure functions of tensors; every one returns a value per picture (B,).

Legend: B batch, C channels, H W latent height and width, N image tokens, D feature width.
"""


def velocity_loss(student_velocity, teacher_velocity):
    """Match the teacher's guided velocity, so that guidance is baked into the student.

    Shapes: both (B, C, H, W). Source: velocity distillation as in SnapGen++ and BK-SDM, in float32.
    """
    return (student_velocity.float() - teacher_velocity.float()).square().flatten(1).mean(1)


def feature_loss(student_features, teacher_features, outlier=2.0):
    """Match the teacher's token states, seen in the student's basis, leaving out what lies beyond `outlier` deviations.

    Shapes: both (B, N, D). Teacher states are scaled to unit power per picture, the student's by the same factor.
    Source: TinyFusion (Fang et al. 2024), masked representation distillation.
    """
    student_features, teacher_features = student_features.float(), teacher_features.float()
    scale = teacher_features.square().mean((1, 2), keepdim=True).clamp(min=1e-8).rsqrt()     # (B, 1, 1)
    typical = (teacher_features * scale).abs() <= outlier
    error = ((student_features - teacher_features) * scale).square() * typical
    return error.sum((1, 2)) / typical.sum((1, 2)).clamp(min=1)
