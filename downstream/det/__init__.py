"""The parts of detectors other than the backbone."""
