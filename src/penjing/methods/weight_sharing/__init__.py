"""Few distinct values, rows or matrices, used many times."""
