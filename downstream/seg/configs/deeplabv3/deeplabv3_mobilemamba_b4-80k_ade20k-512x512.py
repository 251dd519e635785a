"""DeepLabV3 with MobileMamba-B4, 80,000 iterations on ADE20K at 512 px.

In downstream/seg: ``./tools/dist_train.sh configs/deeplabv3/deeplabv3_mobilemamba_b4-80k_ade20k-512x512.py 4``

Published: 23.4 M parameters, 4.7 G MACs, 36.6 mIoU.
"""

_base_ = ["mmseg::_base_/models/deeplabv3_r50-d8.py", "../_base_/ade20k_80k.py"]

model = dict(
    data_preprocessor=dict(size=(512, 512)),
    pretrained=None,
    backbone=dict(_base_.mobilemamba, _delete_=True, variant="B4"),
    decode_head=dict(in_channels=448, in_index=2, channels=256, num_classes=150),
    auxiliary_head=dict(in_channels=376, in_index=1, num_classes=150),
)
