"""The embedded model organism: a small, seeded, harmless world, a model that knows it, and an exact judge."""
