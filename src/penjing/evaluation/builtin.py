"""Prose that every installation carries: the documentation inside Python and NumPy. No network, no files of ours.

Where it comes from: the language reference behind `help()` (`pydoc_data.topics`), and the docstrings and comment
blocks of the standard library's and NumPy's source files. Only paragraphs that read as prose are kept; examples,
tables and signatures go. A paragraph that occurs twice is kept once, so no paragraph is in both splits.

What it is good for: calibrating and comparing a compressed model with its dense original on any machine. What it is
not: a benchmark. It is technical English, it is most likely part of every model's training data, and it changes
with the versions of Python and NumPy. Perplexities on it compare only between runs with equal fingerprints.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import inspect
import platform
import re
import sysconfig
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

_SKIPPED_FOLDERS = frozenset(
    ("test", "tests", "idlelib", "lib2to3", "turtledemo", "ensurepip", "pydoc_data", "site-packages", "dist-packages")
)
# Comments and every triple-quoted string are consumed in turn, so that a quote cannot be read as the wrong end of a
# string; only strings that begin a line (group 1) are docstrings.
_DOCSTRING = re.compile(r'#[^\n]*|(^[ \t]*[rRuU]?)?("""|\'\'\')(.*?)\2', re.DOTALL | re.MULTILINE)
_COMMENT_BLOCK = re.compile(r"(?:^[ \t]*#[^\n]*\n){3,}", re.MULTILINE)
_COMMENT_SIGN = re.compile(r"^[ \t]*#+ ?", re.MULTILINE)
_BLANK_LINE = re.compile(r"\n[ \t]*\n")
_CODE_LINE = re.compile(
    r"^[ \t]*(?:@\w|[\w.\[\]\"']+ ?[-+|]?= ?\S|[\w.]+\(|return\b|(?:from|import) [\w.]+|"
    r"(?:def|class|if|elif|else|for|while|with|try|except)\b.*:$)",
    re.MULTILINE,
)
_THREE_WORDS = re.compile(r"[a-z]{2,} [a-z]{2,} [a-z]{2,}")
_SIGN = re.compile(r"[^\w\s]|[\d_]")
_SIGNS = 0.12  # largest share of digits, punctuation and other signs in a paragraph of prose
_SHORTEST = 40  # characters
_PIECE = 6000  # characters: documents are cut near here, so that one long file does not fill the first windows
_EVALUATION_SHARE = 5  # one source in five is for evaluation


def label() -> str:
    """How the corpus is called beside a number: its text depends on these two versions."""
    return f"builtin (Python {platform.python_version()} and NumPy {metadata.version('numpy')} documentation)"


def documents(split: str) -> list[str]:
    """The documents of a split ("calibration" or "evaluation"), in an order that mixes the sources.

    A source (a help topic, a module) belongs to one split, decided by a hash of its name. Reading takes a few
    seconds once per process.
    """
    pieces = [
        piece
        for name, paragraphs in _corpus()
        if _is_evaluation(name) == (split == "evaluation")
        for piece in _pieces(paragraphs)
    ]
    return sorted(pieces, key=lambda piece: hashlib.sha256(piece.encode()).digest())


def _is_evaluation(name: str) -> bool:
    return hashlib.sha256(name.encode()).digest()[0] % _EVALUATION_SHARE == 0


@functools.lru_cache(maxsize=1)
def _corpus() -> tuple[tuple[str, tuple[str, ...]], ...]:
    """(source name, its paragraphs) with every paragraph once, in a fixed order of the sources."""
    seen: set[str] = set()
    corpus = []
    for name, text in _sources():
        paragraphs = []
        for paragraph in _BLANK_LINE.split(text):
            words = " ".join(paragraph.split())
            if words not in seen and _is_prose(paragraph, words):
                seen.add(words)
                paragraphs.append(paragraph.strip("\n"))
        corpus.append((name, tuple(paragraphs)))
    return tuple(corpus)


def _sources() -> Iterator[tuple[str, str]]:
    """(name, text) of help topics, then of every source file, sorted by name."""
    from pydoc_data.topics import topics

    for topic in sorted(topics):
        yield f"topic {topic}", topics[topic]
    for package, folder in (("python", Path(sysconfig.get_path("stdlib"))), ("numpy", _numpy_folder())):
        for path in sorted(folder.rglob("*.py")):
            inside = path.relative_to(folder)
            if not _SKIPPED_FOLDERS & set(inside.parts):
                yield f"{package} {inside.as_posix()}", _documentation(path)


def _numpy_folder() -> Path:
    found = importlib.util.find_spec("numpy")
    assert found is not None and found.origin is not None  # a core dependency
    return Path(found.origin).parent


def _documentation(path: Path) -> str:
    """Docstrings, then comment blocks, of a source file; nothing if it is not UTF-8."""
    try:
        source = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return ""
    docstrings = [inspect.cleandoc(found[3]) for found in _DOCSTRING.finditer(source) if found[1] is not None]
    comments = [_COMMENT_SIGN.sub("", found[0]) for found in _COMMENT_BLOCK.finditer(source)]
    return "\n\n".join(docstrings + comments)


def _is_prose(paragraph: str, words: str) -> bool:
    """Whether a paragraph is sentences rather than code, a table or a list of names."""
    if len(words) < _SHORTEST or not _THREE_WORDS.search(words):
        return False
    if ">>>" in paragraph or _CODE_LINE.search(paragraph):
        return False
    return len(_SIGN.findall(paragraph)) <= _SIGNS * len(paragraph)


def _pieces(paragraphs: tuple[str, ...]) -> Iterator[str]:
    """Consecutive paragraphs joined to documents of at least `_PIECE` characters (the last one may be shorter)."""
    piece: list[str] = []
    size = 0
    for paragraph in paragraphs:
        piece.append(paragraph)
        size += len(paragraph)
        if size >= _PIECE:
            yield "\n\n".join(piece)
            piece, size = [], 0
    if piece:
        yield "\n\n".join(piece)
