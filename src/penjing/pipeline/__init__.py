"""The only code that walks a model: block by block, from a plan to a verified directory."""
