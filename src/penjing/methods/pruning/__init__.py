"""Methods that remove weights or whole blocks. One paper, one file."""
