"""Who gets how much: one choice for every unit of a model under a budget of bytes."""
