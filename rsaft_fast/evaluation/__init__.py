"""Evaluation: what is said of pictures when they are compared."""
