"""The one training loop, for every method that learns on a whole model.

A method gives an objective and what may be trained (`methods/training.py`); batches come from `data`; the loop owns the
optimiser, its schedule, mixed precision, several devices, the log, and the point from which a killed run continues.
"""

from penjing.training.data import Pair, Pairs, Windows, read_pairs
from penjing.training.log import Curve, read_curve
from penjing.training.loop import train

__all__ = ["Curve", "Pair", "Pairs", "Windows", "read_curve", "read_pairs", "train"]
