"""Kernels for the scans: Triton here, C++ and CUDA C++ in their own package under selective_scan/."""
