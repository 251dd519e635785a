"""MobileMamba-B1 in mmpretrain, trained on class folders: one folder per class under ``train/`` and ``val/``.

For those who live in OpenMMLab: the published recipe is `run.py`'s. With ``data_root`` and ``num_classes`` given:
``--cfg-options train_dataloader.dataset.data_root=... val_dataloader.dataset.data_root=... model.head.num_classes=...``
"""

_base_ = [
    "mmpretrain::_base_/datasets/imagenet_bs64_swin_256.py",
    "mmpretrain::_base_/schedules/imagenet_bs1024_adamw_swin.py",
    "mmpretrain::_base_/default_runtime.py",
    "../../_base_/mobilemamba.py",
]

model = dict(
    type="ImageClassifier",
    backbone=dict(_base_.mobilemamba, variant="B1", pretrained=False, out_indices=(3,)),
    neck=dict(type="GlobalAveragePooling"),
    head=dict(
        type="LinearClsHead",
        num_classes=1000,
        in_channels=448,
        loss=dict(type="LabelSmoothLoss", label_smooth_val=0.1, mode="original"),
        topk=(1, 5),
    ),
)
train_dataloader = dict(dataset=dict(type="CustomDataset", split=None, data_prefix="train"))
val_dataloader = dict(dataset=dict(type="CustomDataset", split=None, data_prefix="val"))
test_dataloader = val_dataloader
custom_hooks = _base_.checks
