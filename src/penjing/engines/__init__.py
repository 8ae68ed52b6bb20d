"""Where models run: load, logits, generate and time behind one interface. `ENGINES` is the table.

Engines run in a process of their own (`EngineProcess`): what crashes there does not take anything along, and its peak
of memory is its own.
"""

from __future__ import annotations

from penjing.engines.base import Engine, LoadedModel, LoadRequest, Sampling
from penjing.engines.process import EngineProcess
from penjing.engines.table import ENGINES, engine_for, engine_named, model_path

__all__ = [
    "ENGINES",
    "Engine",
    "EngineProcess",
    "LoadRequest",
    "LoadedModel",
    "Sampling",
    "engine_for",
    "engine_named",
    "model_path",
]
