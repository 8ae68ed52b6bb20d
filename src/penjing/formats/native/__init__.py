"""Penjing's own safetensors layout, for what no standard format holds; transformers loads it after `import penjing`."""

from penjing.formats.native.format import NativeFormat

__all__ = ["NativeFormat"]
