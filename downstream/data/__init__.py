"""COCO and ADE20K as OpenMMLab lays them out: checks of a folder, and tiny synthetic ones for trials."""
