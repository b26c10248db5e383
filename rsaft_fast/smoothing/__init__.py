"""Smoothing: both balls, the sharpness S1, and whether S1 can be trusted."""
