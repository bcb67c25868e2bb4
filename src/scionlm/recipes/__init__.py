"""Recipes join the floors below: each is a function from a resolved configuration to a finished run folder."""
