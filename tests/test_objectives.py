"""Losses: closed forms, one value per sample, and gradients only for their own network."""

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from train_distillation import Settings, WanLiteStudent
from wanlite.flow import FewSteps, add_noise, clean_from
from wanlite.network import TextTokens, pack_text
from wanlite.training.losses import distribution_matching_loss, feature_loss, push_apart, velocity_loss
from wanlite.training.steps import Networks, few_step_regression, vary_targets


def test_velocity_loss_is_the_mean_square_of_each_sample():
    student, teacher = (
        torch.zeros(3, 2, 4, 4),
        torch.ones(3, 2, 4, 4) * torch.tensor([1.0, 2.0, 0.0])[:, None, None, None],
    )
    assert torch.equal(velocity_loss(student, teacher), torch.tensor([1.0, 4.0, 0.0]))


def test_velocity_loss_is_taken_in_float32():
    assert (
        velocity_loss(torch.ones(1, 1, 2, 2, dtype=torch.bfloat16), torch.zeros(1, 1, 2, 2)).dtype
        == torch.float32
    )


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


def test_distribution_matching_pushes_from_the_critic_to_the_teacher():
    """If teacher and critic predict one image each, the gradient is their difference over the mean
    distance.
    """
    sample = torch.randn(3, 2, 4, 4).requires_grad_()
    noise, level = torch.randn(3, 2, 4, 4), torch.tensor([0.2, 0.5, 0.9])
    noisy = add_noise(sample.detach(), noise, level)
    wanted, generated = torch.full_like(noise, 0.5), torch.full_like(noise, -0.25)
    towards, away = ((noisy - seen) / level.view(-1, 1, 1, 1) for seen in (wanted, generated))
    distribution_matching_loss(sample, noisy, level, towards, away).sum().backward()
    distance = (sample.detach() - wanted).abs().mean((1, 2, 3), keepdim=True)
    assert torch.allclose(sample.grad, (generated - wanted) / distance / sample[0].numel(), atol=1e-6)


def test_distribution_matching_is_zero_if_critic_and_teacher_agree():
    sample, velocity = torch.randn(2, 2, 4, 4).requires_grad_(), torch.randn(2, 2, 4, 4)
    loss = distribution_matching_loss(
        sample, torch.randn(2, 2, 4, 4), torch.tensor([0.3, 0.6]), velocity, velocity
    )
    loss.sum().backward()
    assert torch.equal(sample.grad, torch.zeros_like(sample)) and loss.shape == (2,)


def test_diversity_keeps_the_mean_and_scales_distances_from_it_by_the_gain():
    torch.manual_seed(0)
    noise_level, mean = torch.full((4096,), 0.9), 3.0
    sample, other = (mean + torch.randn(4096, 1, 2, 2) for _ in range(2))
    noise, other_noise = torch.randn(2, 4096, 1, 2, 2)
    start, other_start = add_noise(sample, noise, noise_level), add_noise(other, other_noise, noise_level)
    aim = clean_from(
        start,
        push_apart(noise - sample, sample, other_start, other_noise - other, noise_level, 0.3),
        noise_level,
    )
    torch.testing.assert_close(aim, sample + 0.3 * (sample - other), atol=1e-5, rtol=0)
    assert abs(aim.mean() - mean) < 0.02
    followed = ((aim - mean) * (sample - mean)).mean() / (
        sample - mean
    ).square().mean()  # the optimum of a regression
    assert abs(followed - 1.3) < 0.02


def test_a_few_step_training_step_has_sizes_that_do_not_depend_on_values():
    """A GPU has not computed the values yet: a size that depends on them would wait for it."""
    few, settings = FewSteps(3.0, (1, 2), (4, 8, 8), 4), Settings(diversity_gain=0.3)
    with FakeTensorMode():
        student = WanLiteStudent(hidden_size=32, depth=1, num_heads=2, num_channels=4, text_dim=8)
        batch = {name: torch.randn(16, 4, 8, 8) for name in ("latents", "image", "velocity")}
        batch |= {name: torch.rand(16) for name in ("timestep", "noise_level")}
        batch["is_noise"] = torch.ones(8, dtype=torch.bool)
        text = TextTokens(torch.randn(16, 5, 8), torch.zeros(16, 5))
        networks = Networks(student, None, 0, None, None, few)
        loss, _ = few_step_regression(networks, settings, batch, text, 0.5, torch.Generator())
        loss.backward()
    assert student.proj_out.weight.grad is not None


def test_the_student_has_more_diverse_targets_only_from_noise():
    def network(latents, timestep, tokens, **_):
        return (latents * 0.5,)

    few = FewSteps(3.0, (1, 2), (1, 2, 2), 4)
    timestep, noise_level = torch.tensor([few.levels[0], few.levels[0], few.levels[1]]).unbind(1)
    latents, sample = torch.randn(3, 1, 2, 2), torch.randn(3, 1, 2, 2)
    batch = {
        "latents": latents,
        "timestep": timestep,
        "noise_level": noise_level,
        "image": sample,
        "is_noise": torch.tensor([True, True, False]),
        "velocity": (latents - sample) / noise_level.view(-1, 1, 1, 1),
    }
    text = pack_text([torch.zeros(2, 4)] * 3)
    networks = Networks(network, None, 0, None, None, few)
    aims = [
        clean_from(
            latents, vary_targets(networks, gain, batch, text, torch.Generator().manual_seed(0)), noise_level
        )
        for gain in (0.0, 0.5)
    ]
    other = few.own_noise((3, 1, 2, 2), torch.Generator().manual_seed(0), "cpu") * (
        1 - 0.5 * noise_level.view(-1, 1, 1, 1)
    )
    assert torch.allclose(aims[0], sample, atol=1e-5)
    assert torch.allclose(aims[1][2], sample[2], atol=1e-5)  # it is not at pure noise
    assert torch.allclose(aims[1][:2], (1.5 * sample - 0.5 * other)[:2], atol=1e-5)
