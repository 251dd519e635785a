"""The published recipes, and fine-tuning from their checkpoints."""
