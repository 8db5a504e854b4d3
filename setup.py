"""Metadata, dependencies and extras (tool settings are in pyproject.toml)."""

from pathlib import Path

from setuptools import find_packages, setup

VERSION = (Path(__file__).parent / "harness" / "VERSION").read_text().strip()

# NVIDIA builds it for these machines; the build for CUDA runs on CPUs too
BUILT = (
    "sys_platform == 'linux' and (platform_machine == 'x86_64' or platform_machine == 'aarch64')"
)
DALI = [f"nvidia-dali-cuda130>=2.4; {BUILT}"]
DALI_CUDA12 = [f"nvidia-dali-cuda120>=2.4; {BUILT}"]
# scikit-learn carries the 1,797 digits
QUICKSTART = ["scikit-learn>=1.3", *DALI]
# PyTorch's exporter, and the runtime that its result is checked with
ONNX = ["onnx>=1.17", "onnxruntime>=1.20", "onnxscript>=0.5"]
SLURM = ["submitit>=1.5.3"]  # for python -m launch
PYTEST = [
    "coverage>=7.10",  # follows processes and os._exit
    "pytest>=8",
    "hypothesis>=6.100",
    "jsonschema>=4.20",
    "mfusepy>=3",  # mounts a folder whose operations are slow or fail (with libfuse3)
    "selenium>=4.20",
    "timm>=1.0",  # loads what is exported
    "pytest-timeout>=2.3",
    "pytest-xdist>=3.6",
]
TEST = [*PYTEST, "ruff>=0.6", "mypy>=1.11", "types-PyYAML", "types-tqdm"]

setup(
    name="large-minibatch-harness",
    version=VERSION,
    description="One recipe, one curve: large-minibatch SGD on 1 GPU or 256 (arXiv 1706.02677)",
    long_description=(Path(__file__).parent / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["harness", "harness.*", "launch", "launch.*"]),
    package_data={
        "harness": ["VERSION", "py.typed"],
        "harness.report": ["*.html", "*.css", "*.js"],
    },
    install_requires=[
        # tested from torch 2.11 with torchvision 0.26 to torch 2.15 with torchvision 0.29
        "torch>=2.11",
        "torchvision>=0.26",
        "jinja2>=3.1",
        "numpy>=1.26",
        "pillow>=10",
        "pydantic>=2.11",
        "pyyaml>=6",
        "safetensors>=0.4",
        "scipy>=1.11",  # Student's t for the report; ImageNet's meta.mat
        "tensorboard>=2.16",
        "tqdm>=4.66",
    ],
    extras_require={
        # benchmarks/loaders.py, step.py and scaling.py; mosaicml (composer) needs torch below 2.7.1
        "bench": [
            "timm>=1.0",
            "simplejpeg>=1.8",
            "mfusepy>=3",  # benchmarks/sources.py
            "lightning>=2.5",
            "accelerate>=1.10",
            "matplotlib>=3.8",
        ],
        "dali": DALI,
        "dali-cuda12": DALI_CUDA12,
        "onnx": ONNX,
        "quickstart": QUICKSTART,
        "slurm": SLURM,
        "test": QUICKSTART + SLURM + ONNX + TEST,
    },
    entry_points={"console_scripts": ["harness=harness.commands.command_line:main"]},
)
