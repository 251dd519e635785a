"""Entry points of torch.hub: ``torch.hub.load("<folder of this repository>", "mobilemamba_b1", source="local")``.

They take timm's arguments: ``pretrained``, ``num_classes``, ``in_chans``, ``features_only``, ``out_indices``, ...
"""

from model.timm_models import (
    mobilemamba_b1,
    mobilemamba_b2,
    mobilemamba_b4,
    mobilemamba_s6,
    mobilemamba_t2,
    mobilemamba_t4,
)

__all__ = [
    "dependencies",
    "mobilemamba_b1",
    "mobilemamba_b2",
    "mobilemamba_b4",
    "mobilemamba_s6",
    "mobilemamba_t2",
    "mobilemamba_t4",
]

dependencies = ["torch", "timm", "safetensors", "numpy", "filelock", "tqdm"]
