"""Smoothing: perturbation of pictures and weights, the sharpness S1, and whether S1 can be trusted."""
