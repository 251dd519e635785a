"""MobileMamba-B1 in mmpretrain on class folders: ``train/CLASS/*`` and ``val/CLASS/*`` below a folder.

For networks that are to stay in OpenMMLab; the published recipe is run.py's. Data elsewhere, and of other classes:
``--cfg-options train_dataloader.dataset.data_root=FOLDER val_dataloader.dataset.data_root=FOLDER
test_dataloader.dataset.data_root=FOLDER model.head.num_classes=N``

What it trains serves a detector or segmentor as ``model.backbone.pretrained``.
"""

_base_ = [
    "mmpretrain::_base_/datasets/imagenet_bs64_swin_256.py",
    "mmpretrain::_base_/schedules/imagenet_bs1024_adamw_swin.py",
    "mmpretrain::_base_/default_runtime.py",
    "../../_base_/mobilemamba.py",
]

data_preprocessor = dict(num_classes=None)  # the head's is enough
model = dict(
    type="ImageClassifier",
    backbone=dict(_base_.mobilemamba, variant="B1", pretrained=False, out_indices=(3,)),
    neck=dict(type="GlobalAveragePooling"),
    head=dict(
        type="LinearClsHead",
        num_classes=1000,
        in_channels=448,
        loss=dict(type="LabelSmoothLoss", label_smooth_val=0.1, mode="original"),
    ),
)
folders = dict(_delete_=True, type="CustomDataset", data_root="data/imagenet")
train_dataloader = dict(dataset=dict(folders, data_prefix="train", pipeline=_base_.train_pipeline))
val_dataloader = dict(dataset=dict(folders, data_prefix="val", pipeline=_base_.test_pipeline))
test_dataloader = val_dataloader
custom_hooks = _base_.checks
