"""Trimming a vocabulary: tokens that a use never meets leave the embedding, and the tokenizer forgets them.

    kept = special tokens, single characters of ASCII, then the tokens of the data from the most frequent on

In a small encoder more than half of the parameters are the embedding's. Where a text holds kept tokens only, the model
computes what it did before, to the bit; a word whose token is gone is cut into shorter pieces, down to characters.

Worked example: words {play, ##ing, playing}, data "playing playing play", one token to keep besides characters:
"playing" (seen twice). The text "play" becomes p ##l ##a ##y.

Source: Abdaoui et al. 2020, "Load What You Need: Smaller Versions of Multilingual BERT" (arXiv:2010.05609).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import Field

from penjing.methods.base import Options, Remake
from penjing.models.layout import Layout

WORD_PIECES = ("bert", "distilbert")
"""Model types whose tokenizers cut words by the longest known piece, so that any piece but characters can go."""

INSIDE = "##"
"""How a piece begins that does not begin a word."""


class VocabularyOptions(Options):
    """Recipe keys of trimming a vocabulary."""

    data: str = Field(description="records with `text` whose tokens are counted: JSONL or JSON")
    keep: int = Field(ge=256, description="tokens that stay, special ones and characters among them")

    def config(self, config: Mapping[str, Any], layout: Layout) -> Mapping[str, Any]:
        """config.json of the trimmed model. Raises ValueError for a vocabulary that cannot be trimmed or is smaller."""
        if config["model_type"] not in WORD_PIECES:
            raise ValueError(
                f"the vocabulary of a {config['model_type']} model is not made of word pieces: its pieces are merged "
                "from each other, and none can be left out"
            )
        there = layout.embedding.shape[0]
        if self.keep > there:
            raise ValueError(f"{self.keep} tokens cannot be kept of {there}")
        return {**config, "vocab_size": self.keep}


@dataclass(frozen=True, kw_only=True)
class VocabularyCut(Remake):
    """The kind of `Remake` that leaves tokens out."""


def kept_tokens(pieces: Mapping[str, int], special: Collection[int], seen: Mapping[int, int], keep: int) -> list[int]:
    """Old ids, ascending, of the `keep` tokens that stay; the new id is the place in this list.

    pieces  text -> old id    special  old ids that always stay    seen  old id -> how often it occurs

    Raises ValueError when special tokens and characters alone are more than `keep`.
    """
    needed = set(special) | {number for piece, number in pieces.items() if _is_character(piece)}
    if len(needed) > keep:
        raise ValueError(f"special tokens and single characters alone are {len(needed)}; raise `keep` to more")
    rest = sorted(set(pieces.values()) - needed, key=lambda number: (-seen.get(number, 0), number))
    return sorted(needed | set(rest[: keep - len(needed)]))


def _is_character(piece: str) -> bool:
    bare = piece.removeprefix(INSIDE) or piece
    return len(bare) == 1 and bare.isascii()


def trimmed_tokenizer(tokenizer: Mapping[str, Any], keep: list[int]) -> dict[str, Any]:
    """The contents of tokenizer.json with the tokens `keep` (old ids) under their places in it.

    Raises ValueError for a tokenizer that is not made of word pieces.
    """
    model = tokenizer["model"]
    if model.get("type", "WordPiece") != "WordPiece":
        raise ValueError(
            f"a tokenizer of kind {model['type']} cannot be trimmed; its pieces are merged from each other"
        )
    place = {old: new for new, old in enumerate(keep)}
    vocabulary = {piece: place[old] for piece, old in model["vocab"].items() if old in place}
    added = [{**token, "id": place[token["id"]]} for token in tokenizer.get("added_tokens", ())]
    trimmed = {**tokenizer, "model": {**model, "vocab": vocabulary}, "added_tokens": added}
    if padding := tokenizer.get("padding"):
        trimmed["padding"] = {**padding, "pad_id": place[padding["pad_id"]]}
    trimmed["post_processor"] = _renumbered(tokenizer.get("post_processor"), vocabulary)
    return trimmed


def _renumbered(post: Any, vocabulary: Mapping[str, int]) -> Any:
    """What is put around a text, with the new numbers of its special tokens."""
    if not post:
        return post
    if "special_tokens" in post:
        tokens = {
            name: {**token, "ids": [vocabulary[piece] for piece in token["tokens"]]}
            for name, token in post["special_tokens"].items()
        }
        return {**post, "special_tokens": tokens}
    return {key: [value[0], vocabulary[value[0]]] if key in ("sep", "cls") else value for key, value in post.items()}


def count(ids: Collection[list[int]]) -> Counter[int]:
    """How often each token occurs in texts of ids."""
    return Counter(number for text in ids for number in text)
