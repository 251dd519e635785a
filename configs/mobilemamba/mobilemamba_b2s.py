r"""MobileMamba-B2† on ImageNet-1K at 384 px: distilled from TResNet-L v2.

Train, then test the released weights::

    python3 -m torch.distributed.launch --nproc_per_node=8 --nnodes=1 --use_env run.py \
        -c configs/mobilemamba/mobilemamba_b2s -m train
    python3 -m torch.distributed.launch --nproc_per_node=8 --nnodes=1 --use_env run.py \
        -c configs/mobilemamba/mobilemamba_b2s -m test \
        model.model_kwargs.checkpoint_path=weights/MobileMamba_B2s/mobilemamba_b2s.pth

Cost: 17,122,849 parameters, 2,427 M MACs, 1000 epochs at a total batch of 1024, and as many
forward passes of the teacher, which is read from pretrained/tresnet_l_v2_83_9.pth.
Published top-1 / top-5: 83.260 / 96.438.
"""

from configs.mobilemamba._recipe import distilled
from configs.schema import Config


def get_config() -> Config:
    """Return a fresh configuration."""
    return distilled("MobileMamba_B2", size=384)
