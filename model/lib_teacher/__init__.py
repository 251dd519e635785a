"""Networks to distil from, by the names that the recipes use."""

from __future__ import annotations

from .tresnet import TEACHERS, create_teacher

__all__ = ["TEACHERS", "create_teacher"]
