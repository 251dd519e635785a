"""Cross-entropy with class indices, with label smoothing, and with target probabilities.

Shapes: B images, C classes.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["CrossEntropy", "SoftTargetCrossEntropy"]


class CrossEntropy(nn.Module):
    """Mean cross-entropy with class indices.

    Args:
        smoothing: Share of the target that is spread evenly over all classes, below 1.
        fp32: Compute in single precision whatever the logits' type.
    """

    def __init__(self, *, smoothing: float = 0.0, fp32: bool = True) -> None:
        super().__init__()
        self.smoothing = smoothing
        self.fp32 = fp32

    def forward(self, images: Tensor, logits: Tensor, targets: Tensor) -> Tensor:
        """Return the loss of logits (B, C) and class indices (B,); images (B, 3, H, W) are not used."""
        if targets.is_floating_point():
            raise ValueError(
                f"cross-entropy with class indices got targets of shape {tuple(targets.shape)} and type "
                f"{targets.dtype}; for probabilities, as mixup makes them, the loss term is SoftTargetCE"
            )
        if self.fp32:
            logits = logits.float()
        return F.cross_entropy(logits, targets, label_smoothing=self.smoothing)


class SoftTargetCrossEntropy(nn.Module):
    """Mean cross-entropy with target probabilities, as mixup makes them.

    Args:
        fp32: Compute in single precision whatever the logits' type.
    """

    def __init__(self, *, fp32: bool = True) -> None:
        super().__init__()
        self.fp32 = fp32

    def forward(self, images: Tensor, logits: Tensor, targets: Tensor) -> Tensor:
        """Return the loss of logits (B, C) and probabilities (B, C); images (B, 3, H, W) are not used."""
        if targets.shape != logits.shape:
            raise ValueError(
                f"cross-entropy with target probabilities got targets of shape {tuple(targets.shape)} for logits of "
                f"shape {tuple(logits.shape)}; for class indices the loss term is CE or LabelSmoothingCE, and mixup's "
                "num_classes is the network's"
            )
        if self.fp32:
            logits = logits.float()
        return F.cross_entropy(logits, targets.to(logits.dtype))
