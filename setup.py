"""Packaging: the library, and experiments/ and configs/ installed inside it as xattn.experiments and xattn.configs."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+?)"', (HERE / "xattn" / "__init__.py").read_text())[1]

setup(
    name="xattn",
    version=VERSION,
    description="Build Transformers from attention flags; train them small; see what each flag costs and buys.",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.11,<3.14",
    packages=find_packages(include=["xattn", "xattn.*"]) + ["xattn.experiments", "xattn.configs"],
    package_dir={"xattn.experiments": "experiments", "xattn.configs": "configs"},
    package_data={
        "xattn.configs": ["*.yaml", "**/*.yaml"],
        "xattn.experiments": ["corpora/*"],
    },
    install_requires=[
        "torch>=2.11,<2.15",
        "einops>=0.8",
        "triton>=3.6; platform_system == 'Linux'",
        "safetensors>=0.5",
        "hydra-core>=1.3.4,<1.4",
        "wandb>=0.19",
        "matplotlib>=3.8",
        "rich>=13",
        "numpy>=1.26",
    ],
    extras_require={
        "test": ["pytest>=8", "pytest-xdist>=3.6", "hypothesis>=6.100", "setuptools>=70", "wheel", "tokenizers>=0.20", "tensorboard>=2.18"],
        "tensorboard": ["tensorboard>=2.18"],
        "data": ["datasets>=3", "tokenizers>=0.20", "tiktoken>=0.8"],
        "sweep": ["hydra-submitit-launcher>=1.2", "hydra-optuna-sweeper>=1.2"],
    },
    entry_points={
        "console_scripts": [
            "xattn-train=xattn.experiments.train:main",
            "xattn-compare=xattn.experiments.compare:main",
            "xattn-eval=xattn.experiments.evaluate:main",
            "xattn-generate=xattn.experiments.generate:main",
        ]
    },
)
