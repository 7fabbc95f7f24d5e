"""rlbf_jax: language models that take back what they should not have said, in JAX."""

__version__ = "0.1.0"
