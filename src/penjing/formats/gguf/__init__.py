"""GGUF, the file of llama.cpp: one file with metadata, tokenizer and blocks of codes."""

from penjing.formats.gguf.format import GGUFFormat

__all__ = ["GGUFFormat"]
