"""Training, testing and trying out detectors and segmentors; what det/tools and seg/tools share."""
