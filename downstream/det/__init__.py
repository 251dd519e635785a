"""What detectors need beside the backbone."""
