"""Counts a model's parameters, and its operations on one image."""
