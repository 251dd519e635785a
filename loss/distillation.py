"""Distillation from a teacher with its own input size and normalisation (the † recipes).

Shapes: B images, C classes, H x W the student's input, S x S the teacher's.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from configs.schema import Teacher
from model import create_model

__all__ = ["CLSKDLoss", "build_teacher"]

logger = logging.getLogger(__name__)


class CLSKDLoss(nn.Module):
    """Loss between the logits of a student and of a frozen teacher.

    Soft: the Kullback-Leibler divergence of the two log-softmax at temperature tau, summed over the classes, averaged
    over the images, times tau^2 (Hinton et al., arXiv 1503.02531). Hard: cross-entropy with the teacher's class.

    The teacher moves with ``.to()`` but is no submodule: it is never in train mode, its parameters are not among
    ``parameters()`` and its weights are not in ``state_dict()``. It runs under the autocast of the caller.

    Args:
        teacher: Network from (B, 3, S, S) to logits (B, C).
        kd_type: ``soft`` or ``hard``.
        tau: Temperature of the soft loss, above 0.
        size: S, in pixels; inputs of another size are resized, bicubic.
        mean_t: Normalisation that the teacher expects, with ``std_t``.
        std_t: See ``mean_t``.
        mean_s: Normalisation of the images passed in, with ``std_s``.
        std_s: See ``mean_s``.
        fp32: Compute the loss in single precision whatever the logits' type.

    Raises:
        ValueError: The means and standard deviations differ in their number of channels.
    """

    def __init__(
        self,
        teacher: nn.Module,
        *,
        kd_type: str = "soft",
        tau: float = 1.0,
        size: int = 224,
        mean_t: Sequence[float],
        std_t: Sequence[float],
        mean_s: Sequence[float],
        std_s: Sequence[float],
        fp32: bool = True,
    ) -> None:
        super().__init__()
        self.kd_type = kd_type
        self.tau = tau
        self.size = size
        self.fp32 = fp32
        # Undoing the student's normalisation and applying the teacher's is one affine map per channel.
        scale, shift = _renormalisation(mean_s, std_s, mean_t, std_t)
        self.register_buffer("scale", scale, persistent=False)
        self.register_buffer("shift", shift, persistent=False)
        # A tuple hides the teacher from the registration of submodules; _apply below still moves it.
        self._hidden_teacher = (teacher.eval().requires_grad_(False),)

    @property
    def teacher(self) -> nn.Module:
        """The frozen network."""
        return self._hidden_teacher[0]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> CLSKDLoss:
        super()._apply(fn, recurse)
        self.teacher._apply(fn, recurse)
        return self

    def teacher_input(self, images: Tensor) -> Tensor:
        """Turn the student's input (B, 3, H, W) into the teacher's (B, 3, S, S)."""
        images = images * self.scale + self.shift
        if images.shape[-2:] != (self.size, self.size):
            images = F.interpolate(images, size=(self.size, self.size), mode="bicubic", align_corners=False)
        return images

    def forward(self, images: Tensor, logits: Tensor, targets: Tensor) -> Tensor:
        """Return the loss of the student's logits (B, C) on its input (B, 3, H, W); targets are not used."""
        with torch.no_grad():
            teacher_logits = self.teacher(self.teacher_input(images))
        if teacher_logits.shape != logits.shape:
            raise ValueError(
                f"the teacher's logits have the shape {tuple(teacher_logits.shape)}, the student's "
                f"{tuple(logits.shape)}: give the teacher the same model_kwargs.num_classes"
            )
        if self.fp32:
            logits = logits.float()
            teacher_logits = teacher_logits.float()
        if self.kd_type == "hard":
            return F.cross_entropy(logits, teacher_logits.argmax(dim=1))
        student_log = F.log_softmax(logits / self.tau, dim=1)
        teacher_log = F.log_softmax(teacher_logits / self.tau, dim=1)
        divergence = F.kl_div(student_log, teacher_log, reduction="batchmean", log_target=True)
        return divergence * self.tau**2


def _renormalisation(
    mean_s: Sequence[float], std_s: Sequence[float], mean_t: Sequence[float], std_t: Sequence[float]
) -> tuple[Tensor, Tensor]:
    """Return scale and shift (1, channels, 1, 1): ((x * std_s + mean_s) - mean_t) / std_t = x * scale + shift."""
    if len({len(values) for values in (mean_s, std_s, mean_t, std_t)}) != 1:
        raise ValueError("mean_s, std_s, mean_t and std_t of a CLSKDLoss must have one value per channel each")
    student_mean, student_std, teacher_mean, teacher_std = torch.tensor(
        [mean_s, std_s, mean_t, std_t], dtype=torch.float64
    ).view(4, 1, -1, 1, 1)
    scale = student_std / teacher_std
    shift = (student_mean - teacher_mean) / teacher_std
    return scale.float(), shift.float()


def build_teacher(config: Teacher) -> nn.Module:
    """Build the network distilled from and load its weights.

    Raises:
        ValueError: The name is unknown, or the weights are missing or do not fit.
    """
    kwargs = config.model_kwargs
    if not (kwargs.checkpoint_path or kwargs.pretrained):
        logger.warning(
            "the teacher %s has random weights: neither checkpoint_path nor pretrained is set in the loss term's "
            "cfg.model_kwargs",
            config.name,
        )
    optional = {"num_classes": kwargs.num_classes, "distillation": kwargs.distillation or None}
    return create_model(
        config.name,
        pretrained=kwargs.pretrained,
        checkpoint_path=kwargs.checkpoint_path,
        ema=kwargs.ema,
        strict=kwargs.strict,
        in_chans=kwargs.in_chans,
        **{name: value for name, value in optional.items() if value is not None},
        **kwargs.extra,
    )
