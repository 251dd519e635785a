"""Training, testing and trying out detectors, segmentors and classifiers; what the tools of all tasks share."""
