"""Loki (arXiv 2605.24176) in JAX: portrait animation from parametric-head coefficients."""

__version__ = "0.2.0"
