"""Faster RL rollouts in an unmodified SGLang server, without changing their distribution."""

__version__ = "0.1.0"
