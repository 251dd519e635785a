"""Kernels for the scans: Triton here, C++ and CUDA C++ in a package of their own under selective_scan/."""
