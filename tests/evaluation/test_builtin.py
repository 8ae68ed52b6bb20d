"""The built-in corpus: big enough, disjoint, prose, and the same in every process."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys

import pytest

from penjing.errors import CalibrationError
from penjing.evaluation import builtin
from penjing.evaluation.text import load_documents

CHARACTERS_PER_TOKEN = 4.5  # no tokenizer packs more into a token on this text (SmolLM2's: 4.1)


def test_both_parts_are_big_enough():
    calibration = load_documents("builtin", "calibration").joined()
    evaluation = load_documents("builtin", "evaluation").joined()
    assert len(calibration) > 350_000 * CHARACTERS_PER_TOKEN
    assert len(evaluation) > 60_000 * CHARACTERS_PER_TOKEN


def test_no_paragraph_is_in_both_parts_or_twice():
    parts = [
        [" ".join(paragraph.split()) for text in builtin.documents(split) for paragraph in text.split("\n\n")]
        for split in ("calibration", "evaluation")
    ]
    assert not set(parts[0]) & set(parts[1])
    assert all(len(part) == len(set(part)) for part in parts)


def test_code_is_left_out():
    text = load_documents("builtin", "calibration").joined()
    letters = sum(character.isalpha() or character.isspace() for character in text) / len(text)
    assert letters > 0.92
    assert ">>>" not in text and "\n    return " not in text


def test_prose_filter():
    def keeps(text: str) -> bool:
        return builtin._is_prose(text, " ".join(text.split()))

    assert keeps("Return the absolute value of a number, which may be\nan integer or a floating point number.")
    assert not keeps("Too short.")
    assert not keeps("for key in sorted(table) and then some other words follow here:\n    print(key)")
    assert not keeps("self.table = a rather long line of words that reads like code to a person")
    assert not keeps(">>> this is an example with many words in a row that nobody reads")
    assert not keeps("0x00 0x01 0x02 0x03 0x04 0x05 0x06 or the and words 0x07 0x08 0x09 0x0a 0x0b")


def test_label_names_the_versions():
    assert load_documents("builtin", "evaluation").label == builtin.label()
    assert f"Python {sys.version_info.major}.{sys.version_info.minor}" in builtin.label()


def test_it_has_no_conversations():
    with pytest.raises(CalibrationError, match="no conversations"):
        load_documents("builtin", "calibration", chat_template=True)


def test_same_text_whatever_the_hash_seed():
    script = (
        "import hashlib; from penjing.evaluation.text import load_documents\n"
        "print(hashlib.sha256(load_documents('builtin', 'evaluation').joined().encode()).hexdigest())\n"
        "import sys; assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    )
    here = hashlib.sha256(load_documents("builtin", "evaluation").joined().encode()).hexdigest()
    environment = os.environ | {"PYTHONHASHSEED": "12345", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.strip() == here
