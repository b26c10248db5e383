"""Evaluation: comparisons of sets of pictures."""
