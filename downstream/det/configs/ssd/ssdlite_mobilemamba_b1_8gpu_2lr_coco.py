"""SSDLite at 320 px with MobileMamba-B1, 120 epochs on COCO, 24 images on each of 8 devices.

In downstream/det: ``./tools/dist_train.sh configs/ssd/ssdlite_mobilemamba_b1_8gpu_2lr_coco.py 8``

Published: 18.0 M parameters, 1.7 G MACs, 24.0 box AP.
"""

_base_ = ["mmdet::ssd/ssdlite_mobilenetv2-scratch_8xb24-600e_coco.py", "../../../_base_/mobilemamba.py"]

custom_imports = dict(imports=[*_base_.custom_imports.imports, "downstream.det.ssd_head"])
channels = (200, 376, 512, 256, 256, 128)
model = dict(
    backbone=dict(_base_.mobilemamba, _delete_=True, variant="B1", out_indices=(1, 2), norm_eval=True),
    neck=dict(in_channels=channels[:2], out_channels=channels),
    bbox_head=dict(type="SSDLiteHead", in_channels=channels),
)
optim_wrapper = dict(_base_.adamw, _delete_=True, optimizer=dict(_base_.adamw.optimizer, lr=12 * 2e-4))
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-5, by_epoch=False, begin=0, end=500),
    dict(type="CosineAnnealingLR", eta_min=0.0, begin=60, T_max=60, end=120, by_epoch=True),
]
custom_hooks = [*_base_.custom_hooks, *_base_.checks]
