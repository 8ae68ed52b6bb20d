"""The arguments of benchmarks that compress one model on one text and measure it on another."""

from __future__ import annotations

import argparse
from pathlib import Path


def text_arguments(description: str | None, *, samples: int, evaluation_length: int) -> argparse.ArgumentParser:
    """A parser of model, texts and directories, and of how much of the texts is read."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--evaluation", required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--samples", type=int, default=samples)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--evaluation-length", type=int, default=evaluation_length)
    return parser
