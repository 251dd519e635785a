r"""MobileMamba-B2 on ImageNet-1K at 384 px.

Train, then test the released weights::

    python3 -m torch.distributed.launch --nproc_per_node=8 --nnodes=1 --use_env run.py \
        -c configs/mobilemamba/mobilemamba_b2 -m train
    python3 -m torch.distributed.launch --nproc_per_node=8 --nnodes=1 --use_env run.py \
        -c configs/mobilemamba/mobilemamba_b2 -m test \
        model.model_kwargs.checkpoint_path=weights/MobileMamba_B2/mobilemamba_b2.pth

Cost: 17,122,849 parameters, 2,427 M MACs, 300 epochs at a total batch of 1024.
Published top-1 / top-5: 81.624 / 95.890.
"""

from configs.mobilemamba._recipe import imagenet
from configs.schema import Config


def get_config() -> Config:
    """Return a fresh configuration."""
    return imagenet("MobileMamba_B2", size=384)
