"""Figures: picture grids, curves, tables."""
