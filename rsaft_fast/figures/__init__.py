"""What is drawn or printed: picture grids, curves, tables."""
