"""The loss terms against their definitions in double precision, their weighted sum, and mixup."""

from __future__ import annotations

import math

import numpy as np
import pytest
import timm.loss
import torch
from torch import nn

from configs.schema import Config, CrossEntropyTerm, LabelSmoothingTerm, LossTerm, SoftTargetTerm
from loss import build_loss, build_mixup
from loss.cross_entropy import CrossEntropy, SoftTargetCrossEntropy

B, C = 6, 10
IMAGES = torch.zeros(B, 3, 4, 4)


def make_logits(dtype: torch.dtype = torch.float32, scale: float = 3.0) -> torch.Tensor:
    logits = torch.randn(B, C, generator=torch.Generator().manual_seed(0)) * scale
    return logits.to(dtype).requires_grad_()


def make_indices() -> torch.Tensor:
    return torch.arange(B) * 7 % C


def make_probabilities() -> torch.Tensor:
    return torch.rand(B, C, generator=torch.Generator().manual_seed(1)).softmax(dim=1)


def make_config(*terms: LossTerm, mixed: bool = False) -> Config:
    config = Config()
    config.loss.loss_terms = list(terms)
    config.trainer.mixup_kwargs.num_classes = C
    config.trainer.mixup_kwargs.prob = 1.0 if mixed else 0.0
    return config


def expected_loss(logits: torch.Tensor, probabilities: torch.Tensor) -> torch.Tensor:
    """The definition, in double precision."""
    logits = logits.detach().double()
    log_p = logits - logits.exp().sum(dim=1, keepdim=True).log()
    return -(probabilities.double() * log_p).sum(dim=1).mean()


def one_hot(smoothing: float) -> torch.Tensor:
    return nn.functional.one_hot(make_indices(), C).double() * (1 - smoothing) + smoothing / C


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.3])
def test_cross_entropy_with_indices(dtype, smoothing):
    logits = make_logits(dtype)
    loss = CrossEntropy(smoothing=smoothing)(IMAGES, logits, make_indices())
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), expected_loss(logits, one_hot(smoothing)), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_cross_entropy_with_probabilities(dtype):
    logits = make_logits(dtype)
    loss = SoftTargetCrossEntropy()(IMAGES, logits, make_probabilities())
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), expected_loss(logits, make_probabilities()), rtol=1e-6, atol=1e-6)


def test_values_and_gradients_are_timms():
    pairs = [
        (CrossEntropy(smoothing=0.1), timm.loss.LabelSmoothingCrossEntropy(0.1), make_indices()),
        (SoftTargetCrossEntropy(), timm.loss.SoftTargetCrossEntropy(), make_probabilities()),
    ]
    for own, reference, targets in pairs:
        logits, reference_logits = make_logits(), make_logits()
        loss, reference_loss = own(IMAGES, logits, targets), reference(reference_logits, targets)
        loss.backward()
        reference_loss.backward()
        torch.testing.assert_close(loss, reference_loss)
        torch.testing.assert_close(logits.grad, reference_logits.grad)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("make_loss", [CrossEntropy, SoftTargetCrossEntropy])
def test_under_autocast_the_loss_is_in_single_precision(make_loss, dtype):
    head = nn.Linear(8, C)
    features = torch.randn(B, 8, generator=torch.Generator().manual_seed(2))
    targets = make_indices() if make_loss is CrossEntropy else make_probabilities()
    with torch.autocast("cpu", dtype=dtype):
        logits = head(features)
        loss = make_loss()(IMAGES, logits, targets)
    assert logits.dtype == dtype
    probabilities = one_hot(0.0) if make_loss is CrossEntropy else targets
    torch.testing.assert_close(loss.double(), expected_loss(logits, probabilities), rtol=1e-6, atol=1e-6)
    loss.backward()
    assert head.weight.grad.dtype == torch.float32


def test_without_fp32_the_loss_has_the_type_of_the_logits():
    logits = make_logits(torch.bfloat16)
    assert SoftTargetCrossEntropy(fp32=False)(IMAGES, logits, make_probabilities()).dtype == torch.bfloat16
    assert CrossEntropy(fp32=False)(IMAGES, logits, make_indices()).dtype == torch.bfloat16


def test_logits_beyond_half_precision_do_not_overflow():
    logits = torch.full((1, C), -6e4, dtype=torch.float16)
    logits[0, 3] = 6e4
    assert CrossEntropy()(IMAGES, logits, torch.tensor([0])).item() == pytest.approx(119_936, rel=1e-3)


def test_terms_are_weighted_named_and_summed():
    terms = build_loss(make_config(CrossEntropyTerm(lam=2.0), LabelSmoothingTerm(name="LS.1", lam=0.5, smoothing=0.1)))
    logits = make_logits()
    total, values = terms(IMAGES, logits, make_indices())
    plain, smoothed = expected_loss(logits, one_hot(0.0)), expected_loss(logits, one_hot(0.1))
    assert list(values) == ["CE", "LS.1"]
    assert values["CE"].item() == pytest.approx(2.0 * plain.item(), rel=1e-6)
    assert values["LS.1"].item() == pytest.approx(0.5 * smoothed.item(), rel=1e-6)
    assert total.item() == pytest.approx((2.0 * plain + 0.5 * smoothed).item(), rel=1e-6)
    assert total.requires_grad
    assert not any(value.requires_grad for value in values.values())


def test_of_two_heads_the_first_meets_the_targets():
    terms = build_loss(make_config(CrossEntropyTerm()))
    logits, other = make_logits(), make_logits(scale=1.0)
    total, _ = terms(IMAGES, (logits, other), make_indices())
    total.backward()
    assert total.item() == pytest.approx(expected_loss(logits, one_hot(0.0)).item(), rel=1e-6)
    assert other.grad is None


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (make_config(), r"loss\.loss_terms is empty"),
        (make_config(CrossEntropyTerm(), CrossEntropyTerm()), "each term needs its own name, got CE, CE"),
    ],
)
def test_terms_that_cannot_be_are_refused(config, message):
    with pytest.raises(ValueError, match=message):
        build_loss(config)


def test_targets_of_the_wrong_kind_are_refused():
    with pytest.raises(ValueError, match=r"class indices got targets of shape \(6, 10\)"):
        CrossEntropy()(IMAGES, make_logits(), make_probabilities())
    with pytest.raises(ValueError, match=r"probabilities got targets of shape \(6,\) for logits of shape \(6, 10\)"):
        SoftTargetCrossEntropy()(IMAGES, make_logits(), make_indices())


def test_mixup_is_built_as_configured():
    config = make_config(mixed=True)
    config.trainer.mixup_kwargs.cutmix_alpha = 0.0
    config.trainer.mixup_kwargs.label_smoothing = 0.2
    images = torch.arange(4.0).view(4, 1, 1, 1).expand(4, 3, 2, 2).clone()
    np.random.seed(0)  # timm's Mixup draws from the global generator
    mixed, targets = build_mixup(config)(images.clone(), torch.tensor([0, 1, 2, 3]))
    share = targets[0, 0].item() - 0.2 / C
    share /= 0.8
    assert 0 < share < 1
    torch.testing.assert_close(mixed, share * images + (1 - share) * images.flip(0))
    torch.testing.assert_close(targets.sum(dim=1), torch.ones(4))
    loss = build_loss(make_config(SoftTargetTerm(), mixed=True))
    total, _ = loss(mixed, torch.zeros(4, C), targets)
    assert total.item() == pytest.approx(math.log(C), rel=1e-6)


def test_mixup_off_is_none():
    assert build_mixup(make_config()) is None
    config = make_config(mixed=True)
    config.trainer.mixup_kwargs.mixup_alpha = config.trainer.mixup_kwargs.cutmix_alpha = 0.0
    assert build_mixup(config) is None
