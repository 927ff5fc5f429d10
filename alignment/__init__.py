"""The shared library: config, jobs, data, chat, packing, models, rollouts, verification. Knows no algorithm."""

__version__ = "0.1.0"
