"""Adaptation: what is trained beside, or into, the weights of a finished model."""
