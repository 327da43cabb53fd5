"""MB-Defense from data to verdict: plant own backdoors, break them, measure what is left, and say so."""
