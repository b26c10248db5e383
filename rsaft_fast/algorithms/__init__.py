"""Algorithms: what one iteration collects, and the gradient that an update follows."""
