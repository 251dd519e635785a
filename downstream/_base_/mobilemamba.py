"""The parts that every configuration here uses: our registered modules, the backbone, and AdamW.

Configurations use `_base_.mobilemamba` and `_base_.adamw`; on their own these change nothing.
"""

custom_imports = dict(
    imports=["downstream.backbone", "downstream.det.necks", "downstream.hooks", "downstream.loading"],
    allow_failed_imports=False,
)
checks = [dict(type="ClassCountHook"), dict(type="CheckpointFitHook")]

mobilemamba = dict(type="MobileMamba", pretrained=True, out_indices=(1, 2, 3), drop_path=0.03)
adamw = dict(
    type="OptimWrapper",
    optimizer=dict(type="AdamW", lr=2e-4, betas=(0.9, 0.999), weight_decay=0.05),
    paramwise_cfg=dict(
        custom_keys=dict(
            absolute_pos_embed=dict(decay_mult=0.0),
            relative_position_bias_table=dict(decay_mult=0.0),
            norm=dict(decay_mult=0.0),
        )
    ),
    clip_grad=dict(max_norm=0.1, norm_type=2),
)
