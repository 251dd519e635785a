"""Training, testing and trying out detectors, segmentors and classifiers: the code of all tasks' tools."""
