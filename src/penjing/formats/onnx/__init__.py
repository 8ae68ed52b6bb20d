"""A decoder for ONNX Runtime: a graph written operator by operator, over the weights where they already lie.

ONNX lets a tensor of a graph be a range of bytes in another file. The shards of the walk are such files: `model.onnx`
names the ranges, so nothing is copied, no file has to stay below 2 GB, and Penjing's own reader (verification,
evaluation, resuming) sees the directory as it sees any other. The same bytes may appear twice, in two shapes: a tied
embedding is looked up and multiplied.
"""

from penjing.formats.onnx.format import GRAPH, OnnxFormat

__all__ = ["GRAPH", "OnnxFormat"]
