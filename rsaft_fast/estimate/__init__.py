"""The peak memory of a run before it begins."""
