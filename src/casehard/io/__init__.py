"""Files, locks, secrets and tensors on disk: complete or absent, never half."""
