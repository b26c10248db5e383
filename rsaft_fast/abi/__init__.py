"""Layouts that the host and every kernel share: chunk tables, scalars, 8-bit codes, random bits."""
