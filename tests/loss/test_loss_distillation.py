"""The distillation loss, and the frozen teacher inside it: its input, its place and its weights."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as vision

import loss as loss_package
from configs.schema import Config, CrossEntropyTerm, DistillationTerm, ModelKwargs, Teacher
from loss import build_loss
from loss.distillation import CLSKDLoss, build_teacher

B, C, S = 4, 5, 12
IMAGENET = {"mean_s": (0.485, 0.456, 0.406), "std_s": (0.229, 0.224, 0.225)}
UNIT = {"mean_t": (0.0, 0.0, 0.0), "std_t": (1.0, 1.0, 1.0)}


class FakeTeacher(nn.Module):
    """A network whose answer depends on its mode; it keeps what it was given."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.body = nn.Sequential(nn.BatchNorm2d(3), nn.Dropout(0.5), nn.AdaptiveAvgPool2d(2), nn.Flatten())
        self.head = nn.Linear(12, C, bias=False)
        with torch.no_grad():
            self.head.weight.copy_(torch.randn(C, 12, generator=generator))
        self.seen: list[torch.Tensor] = []

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.seen.append(images)
        return self.head(self.body(images))


def make_loss(teacher: nn.Module | None = None, **kwargs) -> CLSKDLoss:
    return CLSKDLoss(teacher or FakeTeacher(), **{"size": S, **UNIT, **IMAGENET, **kwargs})


def make_images(size: int = S) -> torch.Tensor:
    """Return 8-bit images under ImageNet's normalisation."""
    generator = torch.Generator().manual_seed(0)
    raw = torch.randint(0, 256, (B, 3, size, size), generator=generator) / 255
    return vision.normalize(raw, IMAGENET["mean_s"], IMAGENET["std_s"])


def make_logits(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(B, C, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()


TARGETS = torch.zeros(B, dtype=torch.long)


@pytest.mark.parametrize("tau", [1.0, 2.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_soft_loss_is_the_divergence_in_double_precision(dtype, tau):
    loss, images, logits = make_loss(tau=tau), make_images(), make_logits(dtype)
    value = loss(images, logits, TARGETS)
    teacher = loss.teacher(loss.teacher_input(images)).double() / tau
    student = logits.detach().double() / tau
    p, q = teacher.softmax(dim=1), student.softmax(dim=1)
    expected = (p * (p.log() - q.log())).sum() / B * tau**2
    assert value.dtype == torch.float32
    torch.testing.assert_close(value.double(), expected, rtol=2e-6, atol=1e-7)
    reference = nn.functional.kl_div(q.log(), p, reduction="batchmean") * tau**2
    torch.testing.assert_close(value.double(), reference, rtol=2e-6, atol=1e-7)
    value.backward()
    gradient = tau * (q - p) / B
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 1e-3}[dtype]
    torch.testing.assert_close(logits.grad.double(), gradient, rtol=tolerance, atol=1e-6)


def test_a_student_that_agrees_has_no_loss():
    loss, images = make_loss(), make_images()
    with torch.no_grad():
        logits = loss.teacher(loss.teacher_input(images))
    assert loss(images, logits, TARGETS).item() == pytest.approx(0.0, abs=1e-6)
    assert loss(images, logits + 3.0, TARGETS).item() == pytest.approx(0.0, abs=1e-6)


def test_hard_loss_is_cross_entropy_with_the_teachers_class():
    loss, images, logits = make_loss(kd_type="hard", tau=3.0), make_images(), make_logits()
    classes = loss.teacher(loss.teacher_input(images)).argmax(dim=1)
    log_p = logits.detach().double().log_softmax(dim=1)
    expected = -log_p[torch.arange(B), classes].mean()
    torch.testing.assert_close(loss(images, logits, TARGETS).double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("student_size", [S, 8, 17])
def test_the_teacher_sees_its_own_size_and_normalisation(student_size):
    teacher_norm = {"mean_t": (0.5, 0.4, 0.3), "std_t": (0.5, 0.25, 0.2)}
    teacher = FakeTeacher()
    make_loss(teacher, **teacher_norm)(make_images(student_size), make_logits(), TARGETS)
    images = make_images(student_size).double()
    for channel in range(3):
        images[:, channel] = images[:, channel] * IMAGENET["std_s"][channel] + IMAGENET["mean_s"][channel]
    if student_size != S:
        images = vision.resize(images, [S, S], InterpolationMode.BICUBIC, antialias=False)
    for channel in range(3):
        images[:, channel] = (images[:, channel] - teacher_norm["mean_t"][channel]) / teacher_norm["std_t"][channel]
    assert teacher.seen[0].shape == (B, 3, S, S)
    torch.testing.assert_close(teacher.seen[0].double(), images, rtol=1e-5, atol=1e-5)


def test_undone_normalisation_gives_the_8_bit_image():
    restored = make_loss().teacher_input(make_images()) * 255
    torch.testing.assert_close(restored, restored.round(), rtol=0, atol=1e-3)


def test_the_teacher_stays_frozen_and_in_eval_mode():
    config = make_config()
    terms = build_with_fake(config)
    teacher = terms.losses[1].teacher
    terms.train()
    images = make_images().requires_grad_()
    total, _ = terms(images, make_logits(), TARGETS)
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    total.backward()
    assert not any(module.training for module in teacher.modules())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert images.grad is None
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())


def test_the_teacher_is_in_neither_the_parameters_nor_the_checkpoint_but_moves_along():
    terms = build_with_fake(make_config())
    assert list(terms.parameters()) == []
    assert terms.state_dict() == {}
    terms.to(torch.float64)
    assert all(parameter.dtype == torch.float64 for parameter in terms.losses[1].teacher.parameters())
    terms.to("meta")
    assert all(parameter.is_meta for parameter in terms.losses[1].teacher.parameters())
    assert terms.losses[1].scale.is_meta


def test_the_teacher_runs_under_autocast_and_the_loss_does_not():
    loss, images = make_loss(), make_images()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = make_logits(torch.bfloat16)
        answer = loss.teacher(loss.teacher_input(images))
        value = loss(images, logits, TARGETS)
    assert answer.dtype == torch.bfloat16
    assert value.dtype == torch.float32
    p, log_q = answer.double().softmax(dim=1), logits.detach().double().log_softmax(dim=1)
    torch.testing.assert_close(value.double(), (p * (p.log() - log_q)).sum() / B, rtol=2e-6, atol=1e-7)


def make_config(**entries) -> Config:
    config = Config()
    config.trainer.mixup_kwargs.prob = 0.0
    config.loss.loss_terms = [CrossEntropyTerm(), DistillationTerm(size=S, **entries)]
    return config


def build_with_fake(config: Config) -> nn.Module:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loss_package, "build_teacher", lambda _: FakeTeacher())
        return build_loss(config)


def test_the_second_head_meets_the_teacher():
    terms = build_with_fake(make_config(lam=5.0))
    images, logits, logits_dist = make_images(), make_logits(), (make_logits().detach() * -2).requires_grad_()
    total, values = terms(images, (logits, logits_dist), TARGETS)
    alone = make_loss()(images, logits_dist, TARGETS)
    assert values["KD"].item() == pytest.approx(5.0 * alone.item(), rel=1e-6)
    assert total.item() == pytest.approx(values["CE"].item() + values["KD"].item(), rel=1e-6)
    gradients = torch.autograd.grad(total, (logits, logits_dist))
    expected = torch.autograd.grad(nn.functional.cross_entropy(logits, TARGETS), logits)
    expected += torch.autograd.grad(5.0 * alone, logits_dist)
    torch.testing.assert_close(gradients, expected)


def test_a_teacher_of_other_classes_is_refused():
    with pytest.raises(ValueError, match=r"teacher's logits have the shape \(4, 5\), the student's \(4, 7\)"):
        make_loss()(make_images(), torch.zeros(B, 7), TARGETS)


def test_means_and_deviations_of_other_channels_are_refused():
    with pytest.raises(ValueError, match="must have one value per channel each"):
        make_loss(mean_t=(0.0,))


def test_a_missing_teacher_checkpoint_is_found_before_training():
    with pytest.raises(ValueError, match=r"no checkpoint pretrained/tresnet_l_v2_83_9\.pth.*pretrained=true"):
        build_loss(make_config())


def test_any_network_can_teach_and_random_weights_are_told(caplog):
    kwargs = ModelKwargs(num_classes=C, extra={"drop_rate": 0.1})
    with caplog.at_level(logging.WARNING):
        teacher = build_teacher(Teacher(name="timm_test_resnet", model_kwargs=kwargs))
    assert "teacher timm_test_resnet has random weights" in caplog.text
    loss = make_loss(teacher, size=32)
    assert loss(make_images(32), make_logits(), TARGETS).isfinite()


def test_any_checkpoint_can_be_the_teachers(tmp_path):
    config = Teacher(name="timm_test_resnet", model_kwargs=ModelKwargs(num_classes=C))
    source = build_teacher(config)
    torch.save({"net": source.state_dict()}, tmp_path / "teacher.pth")
    config.model_kwargs.checkpoint_path = str(tmp_path / "teacher.pth")
    for name, value in build_teacher(config).state_dict().items():
        torch.testing.assert_close(value, source.state_dict()[name], rtol=0, atol=0)
