"""The stock loop collects garbage on every start; what is imported here once need not be walked each time."""

import gc

import peft  # noqa: F401

gc.collect()
gc.freeze()
