r"""MobileMamba-S6 on ImageNet-1K at 224 px.

Train, then test the released weights::

    python3 -m torch.distributed.launch --nproc_per_node=8 --nnodes=1 --use_env run.py \
        -c configs/mobilemamba/mobilemamba_s6 -m train
    python3 -m torch.distributed.launch --nproc_per_node=8 --nnodes=1 --use_env run.py \
        -c configs/mobilemamba/mobilemamba_s6 -m test \
        model.model_kwargs.checkpoint_path=weights/MobileMamba_S6/mobilemamba_s6.pth

Cost: 15,036,632 parameters, 652 M MACs, 300 epochs at a total batch of 1024.
Published top-1 / top-5: 78.002 / 93.992.
"""

from configs.mobilemamba._recipe import imagenet
from configs.schema import Config


def get_config() -> Config:
    """Return a fresh configuration."""
    return imagenet("MobileMamba_S6", size=224)
