"""Analysis: scores of a model's heads, channels and layers as plain arrays, whatever is then done with them."""
