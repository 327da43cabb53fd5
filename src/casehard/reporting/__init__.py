"""One self-contained page per run, and a model card per hardened checkpoint."""
