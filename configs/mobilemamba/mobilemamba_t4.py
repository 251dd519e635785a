r"""MobileMamba-T4 on ImageNet-1K at 192 px.

Train, then test the released weights::

    python3 -m torch.distributed.launch --nproc_per_node=8 --nnodes=1 --use_env run.py \
        -c configs/mobilemamba/mobilemamba_t4 -m train
    python3 -m torch.distributed.launch --nproc_per_node=8 --nnodes=1 --use_env run.py \
        -c configs/mobilemamba/mobilemamba_t4 -m test \
        model.model_kwargs.checkpoint_path=weights/MobileMamba_T4/mobilemamba_t4.pth

Cost: 14,176,090 parameters, 413 M MACs, 300 epochs at a total batch of 1024.
Published top-1 / top-5: 76.086 / 92.772.
"""

from configs.mobilemamba._recipe import imagenet
from configs.schema import Config


def get_config() -> Config:
    """Return a fresh configuration."""
    return imagenet("MobileMamba_T4", size=192)
