"""Knowledge distillation: a small model learns from what a large one says, or from how it computes it."""
