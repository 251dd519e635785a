"""Semantic FPN with MobileMamba-B4, 160,000 iterations on ADE20K at 512 px; the head learns ten times as fast.

In downstream/seg: ``./tools/dist_train.sh configs/sem_fpn/fpn_mobilemamba_b4-160k_ade20k-512x512.py 4``

Published: 19.8 M parameters, 5.6 G MACs, 42.5 mIoU.
"""

_base_ = ["mmseg::_base_/models/fpn_r50.py", "../_base_/ade20k_80k.py"]

model = dict(
    data_preprocessor=dict(size=(512, 512)),
    pretrained=None,
    backbone=dict(_base_.mobilemamba, _delete_=True, variant="B4"),
    neck=dict(in_channels=[200, 376, 448], num_outs=3),
    decode_head=dict(in_channels=[256] * 3, in_index=[0, 1, 2], feature_strides=[16, 32, 64], num_classes=150),
)
optim_wrapper = dict(clip_grad=None, paramwise_cfg=dict(custom_keys=dict(head=dict(lr_mult=10.0))))
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-6, by_epoch=False, begin=0, end=1500),
    dict(type="CosineAnnealingLR", eta_min=0.0, begin=80000, T_max=80000, end=160000, by_epoch=False),
]
train_cfg = dict(max_iters=160000, val_interval=16000)
default_hooks = dict(checkpoint=dict(interval=16000))
