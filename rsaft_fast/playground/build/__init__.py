"""Training of what the playground ships: `python -m rsaft_fast.playground.build`."""
