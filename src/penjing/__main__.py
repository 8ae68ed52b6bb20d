"""`python -m penjing` is the `penjing` command."""

import sys

from penjing.cli import main

if __name__ == "__main__":
    sys.exit(main())
