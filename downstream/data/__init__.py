"""COCO and ADE20K as OpenMMLab lays them out: checks of a folder, and tiny made-up ones for trials."""
