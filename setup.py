"""Package metadata: honest minimum versions. The versions that are tested are pinned in constraints.txt."""

from pathlib import Path

from setuptools import find_packages, setup

VERSION = next(
    line.split('"')[1]
    for line in Path(__file__).with_name("tinyllama_ds").joinpath("__init__.py").read_text().splitlines()
    if line.startswith("__version__")
)
# Folders at the top of the repository that an installed package has inside; `tinyllama_ds.shipped` finds both.
SHIPPED = ["tinyllama_ds.ds_configs", "tinyllama_ds.hostfiles"]

setup(
    name="tinyllama_ds",
    version=VERSION,
    description="Raw text to a TinyLlama-class language model, trained by DeepSpeed",
    license="Apache-2.0",
    python_requires=">=3.11,<3.14",
    packages=[*find_packages(include=["tinyllama_ds", "tinyllama_ds.*"]), *SHIPPED],
    package_dir={package: package.rpartition(".")[2] for package in SHIPPED},
    package_data={"tinyllama_ds": ["**/*.toml", "templates/*"]} | dict.fromkeys(SHIPPED, ["*"]),
    install_requires=[
        "torch>=2.10",
        "deepspeed>=0.19.8,<0.20",
        "transformers>=5.0",
        "tokenizers>=0.22",
        "safetensors>=0.4.3",
        "huggingface-hub>=1.0",
        "sentencepiece>=0.2.1",
        "numpy>=1.26",
        "pydantic>=2.12",
        "jinja2>=3.1",
        "typing-extensions>=4.12",
        "psutil>=5.9",
        "pyarrow>=17.0",
        "tensorboard>=2.17",
        "matplotlib>=3.8",
        "tqdm>=4.66",
    ],
    extras_require={
        "flash": ["flash-attn>=2.7"],
        "fast-prepare": ["gigatoken>=0.10"],
        "gguf": ["gguf>=0.17"],
        "ladder": ["scipy>=1.12"],
        "mpi": ["mpi4py>=4.0"],
        "prefer": ["trl>=1.16,<2", "accelerate>=1.10", "datasets>=4.7"],
        "eval": ["lm-eval>=0.4.13", "accelerate>=1.0", "datasets>=4.0"],
        "dev": [
            *("pytest>=8.0", "pytest-xdist>=3.6", "pytest-randomly>=4.0", "coverage>=7.10", "pre-commit>=4.0"),
            *("hypothesis>=6.100", "zstandard>=0.22", "gguf>=0.17", "scipy>=1.12"),
            *("ruff>=0.12", "mypy>=1.15", "mpi4py>=4.0", "gigatoken>=0.10"),
            *("lm-eval>=0.4.13", "accelerate>=1.10", "datasets>=4.7", "trl>=1.16,<2"),
        ],
    },
    entry_points={"console_scripts": ["tinyllama-ds = tinyllama_ds.cli:main"]},
)
