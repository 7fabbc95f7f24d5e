"""Package metadata. Configuration of ruff, mypy and pytest is in pyproject.toml."""

import pathlib

from setuptools import find_namespace_packages, setup

ROOT = pathlib.Path(__file__).parent
INIT = (ROOT / "rlbf_jax" / "__init__.py").read_text(encoding="utf-8")
VERSION = INIT.split('__version__ = "')[1].split('"')[0]

# Tried: what pip resolves on Python 3.11 (jax 0.10.2, flax 0.12.8) and 3.12 (jax 0.12.0, flax
# 0.12.12). Lower bounds of the JAX family are those; lower bounds of the small libraries are
# somewhat older releases and untried. Upper bounds exclude the next major (for 0.x: minor) version.
JAX = ">=0.10.2,<0.13"
REQUIRES = [
    f"jax{JAX}",
    "flax>=0.12.5,<0.13",
    "optax>=0.2.8,<0.4",
    "orbax-checkpoint>=0.12.8,<0.13",
    "tensorflow-datasets>=4.9.10,<5",
    "sentencepiece>=0.2.1,<0.3",
    "protobuf>=5,<8",
    "tokenizers>=0.21,<0.24",
    "grain>=0.2.18,<0.3",
    "array_record>=0.8.3,<0.9",
    "pyarrow>=18",
    "numpy>=2.0,<3",
    "ml_dtypes>=0.5,<1",
    "tyro>=1.0,<2",
    "rich>=14,<16",
    "tqdm>=4.66,<5",
    "matplotlib>=3.9,<4",
    "jinja2>=3.1.4,<4",
    "requests>=2.32,<3",
    "tensorboardX>=2.6.4,<3",
    "jaxtyping>=0.3,<0.4",
]
GGUF = "gguf>=0.19,<0.20"
TEST = [
    GGUF,
    "pytest>=8.3,<10",
    "pytest-xdist>=3.6,<4",
    "hypothesis>=6.130,<7",
    "chex>=0.1.91,<0.2",
    "beartype>=0.20,<1",
]
EXTRAS = {
    "test": TEST,
    "dev": [
        *TEST,
        "ruff>=0.15,<0.18",
        "mypy>=1.15,<3",
        "pre-commit>=4,<5",
        "types-requests",
        "types-tqdm",
    ],
    "tpu": [f"jax[tpu]{JAX}"],
    "cuda": [f"jax[cuda12]{JAX}"],
    "hf": ["safetensors>=0.5,<0.9"],
    "gguf": [GGUF],
    "eval": ["lm_eval>=0.4.13,<0.5", "inspect_ai>=0.3.285,<0.4"],
    "xm": ["xmanager>=0.8.5"],
}

setup(
    name="rlbf_jax",
    version=VERSION,
    description="Language models that take back what they should not have said, in JAX",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author="The rlbf_jax authors",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_namespace_packages(include=["rlbf_jax", "rlbf_jax.*"], exclude=["*.templates"]),
    package_data={
        "rlbf_jax": ["py.typed"],
        "rlbf_jax.report": ["templates/*.j2", "templates/*.css", "templates/*.js"],
        "rlbf_jax.models.export": ["templates/*.j2", "templates/*.txt"],
    },
    install_requires=REQUIRES,
    extras_require=EXTRAS,
    entry_points={
        "console_scripts": [
            "rlbf = rlbf_jax.cli.main:main",
            "rlbf-lm-eval = rlbf_jax.harness.lm_eval_model:main",
        ],
        "inspect_ai": ["rlbf = rlbf_jax.harness.inspect_registry"],
    },
    classifiers=[
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
