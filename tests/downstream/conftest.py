"""OpenMMLab is imported as `downstream` prepares it, whichever test comes first."""

import downstream  # noqa: F401
