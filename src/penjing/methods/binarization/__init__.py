"""Weights of one sign, two signs, or three values: after training, or as the start of training with them."""
