"""Number grids and linear algebra shared by the methods. Imports torch only."""
