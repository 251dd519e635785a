"""Detectors and segmentors of OpenMMLab as ONNX files: an image in, boxes, masks or labels out."""
