"""Losses: closed forms, one value a picture, and gradients only where they belong."""

import torch

from wanlite.flow import add_noise
from wanlite.objectives import distribution_matching_loss, feature_loss, velocity_loss


def test_velocity_loss_is_the_mean_square_of_each_picture():
    student, teacher = torch.zeros(3, 2, 4, 4), torch.ones(3, 2, 4, 4) * torch.tensor([1.0, 2.0, 0.0])[:, None, None, None]
    assert torch.equal(velocity_loss(student, teacher), torch.tensor([1.0, 4.0, 0.0]))


def test_velocity_loss_is_taken_in_float32():
    assert velocity_loss(torch.ones(1, 1, 2, 2, dtype=torch.bfloat16), torch.zeros(1, 1, 2, 2)).dtype == torch.float32


def test_feature_loss_is_zero_at_the_teacher_and_does_not_depend_on_its_scale():
    states = torch.randn(2, 5, 8)
    other = torch.randn(2, 5, 8)
    assert torch.equal(feature_loss(states, states), torch.zeros(2))
    assert torch.allclose(feature_loss(other, states), feature_loss(100 * other, 100 * states), rtol=1e-4)


def test_feature_loss_leaves_outliers_out():
    teacher = torch.ones(1, 4, 4)
    teacher[0, 0, 0] = 1000.0
    student = teacher.clone().requires_grad_()
    (feature_loss(student * 2, teacher)).sum().backward()
    assert student.grad[0, 0, 0] == 0 and (student.grad[0, 1] != 0).all()


def test_distribution_matching_pushes_from_what_the_critic_sees_to_what_the_teacher_sees():
    """With teacher and critic that each always see one picture, the gradient is the difference over the mean distance."""
    sample = torch.randn(3, 2, 4, 4).requires_grad_()
    noise, level = torch.randn(3, 2, 4, 4), torch.tensor([0.2, 0.5, 0.9])
    noisy = add_noise(sample.detach(), noise, level)
    wanted, drawn = torch.full_like(noise, 0.5), torch.full_like(noise, -0.25)
    towards, away = ((noisy - seen) / level.view(-1, 1, 1, 1) for seen in (wanted, drawn))
    distribution_matching_loss(sample, noisy, level, towards, away).sum().backward()
    distance = (sample.detach() - wanted).abs().mean((1, 2, 3), keepdim=True)
    assert torch.allclose(sample.grad, (drawn - wanted) / distance / sample[0].numel(), atol=1e-6)


def test_distribution_matching_is_silent_where_critic_and_teacher_agree():
    sample, velocity = torch.randn(2, 2, 4, 4).requires_grad_(), torch.randn(2, 2, 4, 4)
    loss = distribution_matching_loss(sample, torch.randn(2, 2, 4, 4), torch.tensor([0.3, 0.6]), velocity, velocity)
    loss.sum().backward()
    assert torch.equal(sample.grad, torch.zeros_like(sample)) and loss.shape == (2,)
