"""Attacks on released weights. They run in memory: attacked weights are handed to the caller and never written."""
