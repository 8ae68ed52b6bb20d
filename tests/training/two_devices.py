"""Trains a tiny model for a few steps and prints its losses; run by a test in one process and in two."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from transformers import AutoModelForCausalLM

from penjing.methods.training import NextToken, Training, TrainOptions
from penjing.training import Windows, train
from tiny_models import token_windows

model = AutoModelForCausalLM.from_pretrained(sys.argv[1]).requires_grad_(True)
options = TrainOptions(steps=4, batch_size=4, micro_batch=1, learning_rate=1e-2)
batches = Windows(token_windows(8, 16), options.batch_size, options.micro_batch, options.seed)
curve = train(Training(model, NextToken()), batches, options, Path(sys.argv[2]), marks={})
print(json.dumps(curve.losses))
