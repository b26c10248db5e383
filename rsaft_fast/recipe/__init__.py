"""A recipe: its keys, how it is read, and what is refused before anything is loaded."""
