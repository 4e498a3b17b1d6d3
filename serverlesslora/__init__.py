"""Serverless multi-LoRA inference: isolated functions that share one read-only backbone."""

__version__ = "0.1.0"
