"""Test-time augmentation for RetinaNet: three sizes, each with its mirror image. Taken by the tools' ``--tta``."""

_base_ = "mmdet::retinanet/retinanet_tta.py"
