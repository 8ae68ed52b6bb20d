"""The `penjing` command as a process of its own; `python -m penjing` is the same."""

import gc
import sys

from penjing.cli import main


def run() -> int:
    """Run the command line and return its exit code."""
    code = main()
    gc.freeze()  # the process ends: no second look for garbage among all that torch imported, which takes half a second
    return code


if __name__ == "__main__":
    sys.exit(run())
