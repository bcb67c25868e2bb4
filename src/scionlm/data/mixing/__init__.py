"""What stands in which slot of training: mixture, packing, order, replay, and weights that move."""
