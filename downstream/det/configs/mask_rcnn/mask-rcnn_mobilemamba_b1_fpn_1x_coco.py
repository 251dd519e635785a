"""Mask R-CNN with MobileMamba-B1, 12 epochs on COCO.

In downstream/det: ``./tools/dist_train.sh configs/mask_rcnn/mask-rcnn_mobilemamba_b1_fpn_1x_coco.py 4``

Published: 38.0 M parameters, 178 G MACs, 40.6 box AP, 37.4 mask AP.
"""

_base_ = [
    "mmdet::_base_/models/mask-rcnn_r50_fpn.py",
    "mmdet::_base_/datasets/coco_instance.py",
    "mmdet::_base_/default_runtime.py",
    "../_base_/adamw_1x.py",
]

model = dict(
    backbone=dict(_base_.mobilemamba, _delete_=True, variant="B1", norm_eval=True),
    neck=dict(type="EfficientViTFPN", in_channels=[200, 376, 448], num_extra_trans_convs=2),
)
train_dataloader = dict(batch_size=4, num_workers=4)
