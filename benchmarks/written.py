"""Text that a model writes itself, for benchmarks of models too small for other text: JSONL with `text`.

python benchmarks/written.py stories260K build/written.train.jsonl --windows 512 --length 256 --seed 0
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from penjing.checkpoint import open_checkpoint, write_bytes
from penjing.evaluation.windows import load_tokenizer
from penjing.methods.distillation.self_written import self_written
from penjing.methods.training import IGNORED
from penjing.training.models import load_model


def main() -> None:
    """Parse, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("output", type=Path)
    parser.add_argument("--windows", type=int, default=512)
    parser.add_argument("--length", type=int, default=256, help="tokens of each, at most")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    checkpoint = open_checkpoint(options.model)
    tokenizer = load_tokenizer(checkpoint.files())
    tokens, labels = self_written(load_model(checkpoint), options.windows, options.length, options.seed)
    lengths = (labels != IGNORED).sum(1).tolist()
    texts = [tokenizer.decode(row[:length].tolist()) for row, length in zip(tokens, lengths, strict=True)]
    options.output.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(options.output, "".join(json.dumps({"text": text}) + "\n" for text in texts).encode())


if __name__ == "__main__":
    main()
