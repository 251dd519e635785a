r"""MobileMamba-T4† on ImageNet-1K at 192 px: distilled from TResNet-L v2.

Train, then test the released weights::

    python3 -m torch.distributed.launch --nproc_per_node=8 --nnodes=1 --use_env run.py \
        -c configs/mobilemamba/mobilemamba_t4s -m train
    python3 -m torch.distributed.launch --nproc_per_node=8 --nnodes=1 --use_env run.py \
        -c configs/mobilemamba/mobilemamba_t4s -m test \
        model.model_kwargs.checkpoint_path=weights/MobileMamba_T4s/mobilemamba_t4s.pth

Cost: 14,176,090 parameters, 413 M MACs, 1000 epochs at a total batch of 1024, and as many
forward passes of the teacher, which is read from pretrained/tresnet_l_v2_83_9.pth.
Published top-1 / top-5: 78.914 / 94.160.
"""

from configs.mobilemamba._recipe import distilled
from configs.schema import Config


def get_config() -> Config:
    """Return a fresh configuration."""
    return distilled("MobileMamba_T4", size=192)
