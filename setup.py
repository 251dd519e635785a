"""Packaging: the network as ``mobilemamba``, the code of ``model/`` under a name of its own."""

from pathlib import Path

from setuptools import setup

SUBPACKAGES = ("mobilemamba", "lib_mamba", "lib_mamba.kernels", "lib_teacher", "zoo")

setup(
    name="mobilemamba",
    version="1.0.0",
    description="MobileMamba: a light visual backbone of wavelet-enhanced bidirectional Mamba (CVPR 2025)",
    long_description=(Path(__file__).parent / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    url="https://arxiv.org/abs/2411.15941",
    python_requires=">=3.10",
    packages=["mobilemamba", *(f"mobilemamba.{name}" for name in SUBPACKAGES)],
    package_dir={"mobilemamba": "model"},
    package_data={"mobilemamba.zoo": ["*.json"]},
    install_requires=["torch>=2.6,<2.15", "timm>=1.0.15", "safetensors", "filelock", "tqdm"],
    extras_require={
        "zoo": ["gdown>=6"],
        "train": ["torchvision", "PyYAML", "lmdb", "tensorboardX", "fvcore", "tqdm", "pillow", "numpy", "scikit-learn"],
    },
)
