"""Methods that round weights to a grid, or prepare them for it. One paper, one file."""
