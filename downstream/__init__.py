"""Detection, segmentation and classification in OpenMMLab with the backbone of `model/`.

Importing this package needs nothing of OpenMMLab; importing its modules registers them in mmengine's root registries,
where mmdet, mmseg and mmpretrain all look after their own. Configurations name the modules in ``custom_imports``.
"""

from .forks import find_forks, leave_out_language_models

find_forks()
leave_out_language_models()
