"""What the host and every kernel agree on: chunk tables, scalars, 8-bit codes, random bits."""
