"""The trainer: a typed recipe, the loop, checkpoints that survive a power cut, and the log."""
