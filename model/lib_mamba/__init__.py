"""State-space parts: the selective scan and the two-dimensional block around it."""

from .selective_scan import selective_scan
from .ss2d import SCANS, SS2D

__all__ = ["SCANS", "SS2D", "selective_scan"]
