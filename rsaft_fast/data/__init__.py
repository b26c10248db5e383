"""Data: prompts, pictures, their encodings, and the batches that an update takes."""
