"""Learned masks: gates on layers, heads and channels of an unmodified model, and what makes them end at a shape."""
