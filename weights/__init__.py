"""The released checkpoints in the repository: ``python -m weights.download`` and ``python -m weights.check``."""
