"""Matrices of low rank in place of full ones."""
