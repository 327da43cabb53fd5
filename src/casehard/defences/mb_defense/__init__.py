"""MB-Defense: plant own backdoors, break them, and with them those nobody described."""
