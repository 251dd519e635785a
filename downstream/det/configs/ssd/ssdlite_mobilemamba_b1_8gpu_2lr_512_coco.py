"""SSDLite at 512 px with MobileMamba-B1; anchors and all else as at 320 px.

In downstream/det: ``./tools/dist_train.sh configs/ssd/ssdlite_mobilemamba_b1_8gpu_2lr_512_coco.py 8``

Published: 18.0 M parameters, 4.4 G MACs, 29.5 box AP.
"""

_base_ = "ssdlite_mobilemamba_b1_8gpu_2lr_coco.py"

input_size = 512
resize = dict(type="Resize", scale=(input_size, input_size), keep_ratio=False)
train_pipeline = [resize if step["type"] == "Resize" else step for step in _base_.train_pipeline]
test_pipeline = [resize if step["type"] == "Resize" else step for step in _base_.test_pipeline]
train_dataloader = dict(dataset=dict(dataset=dict(pipeline=train_pipeline)))
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader
