"""RetinaNet with MobileMamba-B1, 12 epochs on COCO.

In downstream/det: ``./tools/dist_train.sh configs/retinanet/retinanet_mobilemamba_b1_fpn_1x_coco.py 4``

Published: 27.1 M parameters, 151 G MACs, 39.6 box AP.
"""

_base_ = [
    "mmdet::_base_/models/retinanet_r50_fpn.py",
    "mmdet::_base_/datasets/coco_detection.py",
    "mmdet::_base_/default_runtime.py",
    "../_base_/adamw_1x.py",
    "retinanet_tta.py",
]

model = dict(
    backbone=dict(_base_.mobilemamba, _delete_=True, variant="B1", norm_eval=True),
    neck=dict(
        _delete_=True,
        type="EfficientViTFPN",
        in_channels=[200, 376, 448],
        out_channels=256,
        num_outs=5,
        num_extra_trans_convs=1,
        add_extra_convs="on_input",
    ),
    train_cfg=dict(sampler=None),  # the focal loss takes every anchor
)
train_dataloader = dict(batch_size=4, num_workers=4)
