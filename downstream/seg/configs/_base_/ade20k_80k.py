"""ADE20K at 512 px, 80,000 iterations of AdamW: constant after the warm-up, then a cosine over the second half.

For 8 images on each of 4 devices.
"""

_base_ = [
    "mmseg::_base_/datasets/ade20k.py",
    "mmseg::_base_/default_runtime.py",
    "mmseg::_base_/schedules/schedule_80k.py",
    "../../../_base_/mobilemamba.py",
]

optim_wrapper = dict(_base_.adamw, _delete_=True, optimizer=dict(_base_.adamw.optimizer, lr=1.2e-4))
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-5, by_epoch=False, begin=0, end=500),
    dict(type="CosineAnnealingLR", eta_min=0.0, begin=40000, T_max=40000, end=80000, by_epoch=False),
]
auto_scale_lr = dict(enable=False, base_batch_size=32)
train_dataloader = dict(batch_size=8, num_workers=8)
custom_hooks = _base_.checks
