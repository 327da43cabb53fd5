"""Backdoors: what sets them off, what they do, how they are planted, measured, found."""
