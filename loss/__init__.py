"""The loss of a run: a weighted sum of named terms, and mixup of the images that go into it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict

from timm.data import Mixup
from torch import Tensor, nn

from configs.schema import Config, CrossEntropyTerm, DistillationTerm, LabelSmoothingTerm, SoftTargetTerm

from .cross_entropy import CrossEntropy, SoftTargetCrossEntropy
from .distillation import CLSKDLoss, build_teacher

__all__ = ["LossTerms", "build_loss", "build_mixup"]


class LossTerms(nn.Module):
    """Weighted sum of losses.

    A network with two heads returns (logits, logits_dist) in training: the first goes to the terms that compare with
    the targets, the second to those that compare with a teacher.

    Args:
        terms: Loss by the name it is logged under, called with (images, logits, targets).
        weights: Factor of each term (``lam``).
    """

    def __init__(self, terms: Mapping[str, nn.Module], weights: Mapping[str, float]) -> None:
        super().__init__()
        # Pairs in a list, since a name may hold what ModuleDict refuses, a dot for one.
        self.names = list(terms)
        self.losses = nn.ModuleList(terms.values())
        self.weights = [weights[name] for name in self.names]

    def forward(
        self, images: Tensor, outputs: Tensor | tuple[Tensor, Tensor], targets: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss to back-propagate, and each term as it enters the sum, detached.

        Args:
            images: Input of the network (B, 3, H, W).
            outputs: Logits (B, C), or two of them.
            targets: Class indices (B,) or probabilities (B, C).
        """
        logits, logits_dist = outputs if isinstance(outputs, tuple) else (outputs, outputs)
        values = {}
        for name, loss, weight in zip(self.names, self.losses, self.weights, strict=True):
            compared = logits_dist if isinstance(loss, CLSKDLoss) else logits
            values[name] = weight * loss(images, compared, targets)
        total = sum(values.values())
        return total, {name: value.detach() for name, value in values.items()}


def _build_cross_entropy(term: CrossEntropyTerm) -> nn.Module:
    return CrossEntropy(fp32=term.fp32)


def _build_label_smoothing(term: LabelSmoothingTerm) -> nn.Module:
    return CrossEntropy(smoothing=term.smoothing, fp32=term.fp32)


def _build_soft_target(term: SoftTargetTerm) -> nn.Module:
    return SoftTargetCrossEntropy(fp32=term.fp32)


def _build_distillation(term: DistillationTerm) -> nn.Module:
    return CLSKDLoss(
        build_teacher(term.cfg),
        kd_type=term.kd_type,
        tau=term.tau,
        size=term.size,
        mean_t=term.mean_t,
        std_t=term.std_t,
        mean_s=term.mean_s,
        std_s=term.std_s,
        fp32=term.fp32,
    )


LOSSES: dict[str, Callable[..., nn.Module]] = {
    "CE": _build_cross_entropy,
    "LabelSmoothingCE": _build_label_smoothing,
    "SoftTargetCE": _build_soft_target,
    "CLSKDLoss": _build_distillation,
}


def build_loss(config: Config) -> LossTerms:
    """Build the terms of ``loss.loss_terms``, teachers included.

    Raises:
        ValueError: There is no term, two share a name, or a teacher's weights are not there.
    """
    terms = config.loss.loss_terms
    if not terms:
        raise ValueError("loss.loss_terms is empty: there is nothing to train for")
    names = [term.name for term in terms]
    if len(set(names)) < len(names):
        raise ValueError(f"loss.loss_terms: each term needs its own name, got {', '.join(names)}")
    losses = {term.name: LOSSES[term.type](term) for term in terms}
    return LossTerms(losses, {term.name: term.lam for term in terms})


def build_mixup(config: Config) -> Mixup | None:
    """Build timm's Mixup, or return None where no image is mixed.

    It draws from NumPy's global generator, and mixes images in pairs: a resolved configuration has even batches.
    """
    mixup = config.trainer.mixup_kwargs
    return Mixup(**asdict(mixup)) if mixup.is_active else None
