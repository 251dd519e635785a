"""Necks between the backbone and a detector's heads."""

from .efficientvit_fpn import EfficientViTFPN

__all__ = ["EfficientViTFPN"]
