"""Buffer-and-Reinforce at the provider: assets, attaching the buffer to any trainer, screening, pre-flight checks."""
