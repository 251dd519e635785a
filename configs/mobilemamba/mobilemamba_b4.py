r"""MobileMamba-B4 on ImageNet-1K at 512 px.

Train, then test the released weights::

    python3 -m torch.distributed.launch --nproc_per_node=8 --nnodes=1 --use_env run.py \
        -c configs/mobilemamba/mobilemamba_b4 -m train
    python3 -m torch.distributed.launch --nproc_per_node=8 --nnodes=1 --use_env run.py \
        -c configs/mobilemamba/mobilemamba_b4 -m test \
        model.model_kwargs.checkpoint_path=weights/MobileMamba_B4/mobilemamba_b4.pth

Cost: 17,122,849 parameters, 4,313 M MACs, 300 epochs at a total batch of 1024.
Published top-1 / top-5: 82.496 / 96.252.
"""

from configs.mobilemamba._recipe import imagenet
from configs.schema import Config


def get_config() -> Config:
    """Return a fresh configuration."""
    return imagenet("MobileMamba_B4", size=512)
