"""Evaluation: generate answers, judge each, count with intervals. One row per prompt, never only a mean."""
