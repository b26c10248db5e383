"""The experiment: many runs on the playground, whose true preference is known, and what follows from them."""
