"""Packaging: the network as ``mobilemamba``, the code of ``model/`` under a name of its own."""

import re
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
SUBPACKAGES = ("mobilemamba", "lib_mamba", "lib_mamba.kernels", "lib_teacher", "zoo", "export")
# The sources of the compiled scans, which are built against the installed PyTorch, by a pip install of their own.
KERNELS = ("*.md", "*.py", "*.toml", "csrc/**/*", "mobilemamba_kernels/*.py")

TRAIN = ["torchvision", "PyYAML", "lmdb", "tensorboardX", "fvcore", "tqdm", "pillow", "scikit-learn"]
EXTRAS = {
    "train": TRAIN,
    "lmdb": ["lmdb"],
    "heic": ["pillow-heif"],
    "jpeg": ["simplejpeg"],
    "opencv": ["opencv-python-headless"],
    "zoo": ["gdown>=6"],
    "wandb": ["wandb"],
    "mlflow": ["mlflow-skinny>=3"],
    "downstream": [
        "onedl-mmengine==0.10.12",
        "onedl-mmcv==2.3.6",
        "onedl-mmdetection==3.5.1",
        "onedl-mmsegmentation==1.4.2",
        "onedl-mmpretrain==1.3.6",
        "ftfy",
        "regex",
    ],
    "benchmark": ["matplotlib", "onnx", "onnxruntime", "openvino"],
    "onnx": ["onnx", "onnxruntime"],
    "openvino": ["onnx", "openvino"],
    "export": ["onnx", "onnxruntime", "openvino"],
    "int8": ["onnx", "onnxruntime", "openvino", "nncf"],
    "ncnn": ["ncnn", "pnnx"],
    "coreml": ["coremltools>=9", "numpy<2.4"],
    "litert": ["litert_torch", "ai_edge_litert"],
    "executorch": ["executorch"],
    "explain": ["grad-cam"],
    "demo": ["gradio>=6", "grad-cam"],
    "dev": [
        *TRAIN,
        "gdown>=6",
        "pytest",
        "hypothesis",
        "matplotlib",
        "ruff",
        "mypy",
        "types-PyYAML",
        "pylint",
        "clang-format",
        "bandit",
        "pip-audit",
        "mutmut",
        "pytest-xdist",
        "pillow-heif",
        "webdataset",
        "simplejpeg",
        "opencv-python-headless",
        'nvidia-cuda-nvdisasm; platform_system == "Linux"',
        "segmentation-models-pytorch",
        "transformers",
        "selenium",
        "grad-cam",
        "wandb",
        "mlflow-skinny>=3",
        "setuptools>=77,<82",
        "onnx",
        "onnxruntime",
        "openvino",
        "nncf",
        "ncnn",
        "pnnx",
    ],
}

setup(
    name="mobilemamba",
    version=re.search(r'__version__ = "(.+)"', (ROOT / "model" / "version.py").read_text(encoding="utf-8"))[1],
    description="MobileMamba: a light visual backbone of wavelet-enhanced bidirectional Mamba (CVPR 2025)",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    url="https://arxiv.org/abs/2411.15941",
    python_requires=">=3.10",
    packages=["mobilemamba", *(f"mobilemamba.{name}" for name in SUBPACKAGES)],
    package_dir={"mobilemamba": "model"},
    package_data={
        "mobilemamba": ["py.typed"],
        "mobilemamba.lib_mamba.kernels": [f"selective_scan/{pattern}" for pattern in KERNELS],
        "mobilemamba.zoo": ["*.json"],
    },
    install_requires=[
        "torch>=2.6,<2.15",
        "timm>=1.0.31",
        "safetensors",
        "numpy",
        "pillow",
        "PyYAML",
        "filelock",
        "tqdm",
    ],
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["mobilemamba-export = mobilemamba.export.__main__:main"]},
)
