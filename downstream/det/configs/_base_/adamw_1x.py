"""Twelve epochs of AdamW: constant after the warm-up, then a cosine from epoch 6. For 4 images on each of 4 devices."""

_base_ = ["mmdet::_base_/schedules/schedule_1x.py", "../../../_base_/mobilemamba.py"]

optim_wrapper = dict(_base_.adamw, _delete_=True)
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-5, by_epoch=False, begin=0, end=500),
    dict(type="CosineAnnealingLR", eta_min=0.0, begin=6, T_max=6, end=12, by_epoch=True),
]
custom_hooks = _base_.checks
