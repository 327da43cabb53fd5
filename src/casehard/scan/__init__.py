"""Look for backdoors nobody has described: in a data set, and in a model."""
