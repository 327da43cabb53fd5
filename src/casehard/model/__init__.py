"""Models: loading from safetensors, saving with provenance, content digests, adapters."""
