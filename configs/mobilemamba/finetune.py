r"""Fine-tuning a released checkpoint, or one of your own, on your own class folders.

The images lie under ``<root>/train/<class>/`` and ``<root>/val/<class>/``::

    python3 run.py -c configs/mobilemamba/finetune -m ft data.root=path/to/images \
        model.model_kwargs.checkpoint_path=weights/MobileMamba_T2/mobilemamba_t2.pth

The folders give the number of classes and their names. The head is initialised again where the checkpoint has another
number of classes. ``model.freeze=backbone`` trains only the head, ``optim.layer_decay=0.8`` lets lower layers learn
more slowly; docs/finetune.md has more. Another network is ``model.name=MobileMamba_B1 size=256`` with its checkpoint.

The group ``finetune`` holds what mode ft changes: 30 epochs, 5 of them warm-up, a sixth of the learning rate and next
to no weight decay. Cost: a tenth of the 300 epochs of training, on fewer images. Accuracy depends on the images; none
is published.
"""

from configs.mobilemamba._recipe import imagenet
from configs.schema import Config


def get_config() -> Config:
    """Return a fresh configuration."""
    config = imagenet("MobileMamba_T2", size=192)
    config.data.root = "data/my_images"
    config.nb_classes = None  # as many as there are class folders
    config.batch_size = 256
    config.trainer.checkpoint = "runs/finetune"
    config.trainer.ema = 0.99  # averages over some 100 steps: a small dataset gives few
    return config
