"""Clipping of gradients by norm, by value and adaptively, against the definitions."""

from __future__ import annotations

import torch

from optim import clip_gradients


def make_parameters() -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((4, 3, 3, 3), (5, 4), (5,))]
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    parameters.append(torch.nn.Parameter(torch.ones(2)))  # without a gradient
    return parameters


def gradients(parameters: list[torch.nn.Parameter]) -> list[torch.Tensor]:
    return [parameter.grad for parameter in parameters if parameter.grad is not None]


def test_norm_returns_the_norm_before_and_leaves_the_limit():
    parameters = make_parameters()
    before = torch.cat([gradient.flatten() for gradient in gradients(parameters)]).double().clone()
    returned = clip_gradients(iter(parameters), clip=5.0, mode="norm")
    after = torch.cat([gradient.flatten() for gradient in gradients(parameters)]).double()
    torch.testing.assert_close(returned.double(), before.norm())
    torch.testing.assert_close(after, before * 5.0 / before.norm(), rtol=1e-6, atol=1e-6)


def test_norm_within_the_limit_changes_nothing():
    parameters = make_parameters()
    before = [gradient.clone() for gradient in gradients(parameters)]
    clip_gradients(parameters, clip=1e3)
    for gradient, expected in zip(gradients(parameters), before, strict=True):
        torch.testing.assert_close(gradient, expected, rtol=0, atol=0)


def test_norm_of_a_bad_gradient_is_reported():
    parameters = make_parameters()
    parameters[0].grad[0, 0, 0, 0] = float("nan")
    assert clip_gradients(parameters, clip=5.0).isnan()


def test_value_bounds_every_entry():
    parameters = make_parameters()
    before = [gradient.clone() for gradient in gradients(parameters)]
    assert clip_gradients(iter(parameters), clip=0.3, mode="value") is None
    for gradient, expected in zip(gradients(parameters), before, strict=True):
        torch.testing.assert_close(gradient, expected.clamp(-0.3, 0.3), rtol=0, atol=0)


def test_agc_bounds_the_ratio_of_each_unit():
    parameters = make_parameters()
    before = [gradient.clone() for gradient in gradients(parameters)]
    assert clip_gradients(iter(parameters), clip=0.02, mode="agc") is None
    for parameter, gradient in zip(parameters, before, strict=False):
        rows = gradient.reshape(len(gradient), -1) if gradient.ndim > 1 else gradient[None]
        weights = parameter.detach().reshape(len(gradient), -1) if gradient.ndim > 1 else parameter.detach()[None]
        limit = 0.02 * weights.norm(dim=1).clamp(min=1e-3)
        expected = rows * (limit / rows.norm(dim=1)).clamp(max=1)[:, None]
        torch.testing.assert_close(parameter.grad, expected.reshape(gradient.shape))
