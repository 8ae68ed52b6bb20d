"""Files of questions: what is read, how a prompt is made of a record, and what is said of a bad file."""

import gzip
import json
from pathlib import Path

import pytest

from penjing.errors import CalibrationError
from penjing.evaluation.questions import joint, prompt, read_questions

CHOICE = {"query": "The sky is", "choices": ["blue", "square"], "gold": 0}
NEXT = {"context": "Two roads diverged in a yellow", "continuation": "wood"}


def write(path: Path, *lines: object) -> Path:
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.gz"])
def test_both_shapes_are_read_and_other_keys_left_out(tmp_path: Path, ending: str) -> None:
    choice = read_questions(write(tmp_path / f"sky{ending}", CHOICE | {"subject": "colour"}, "", CHOICE))
    assert (choice.name, choice.multiple_choice, choice.records) == ("sky", True, (CHOICE, CHOICE))
    roads = read_questions(write(tmp_path / f"roads{ending}", NEXT))
    assert (roads.multiple_choice, roads.records) == (False, (NEXT,))
    assert len(roads.digest) == 64 and roads.digest != choice.digest


def test_prompts() -> None:
    assert prompt(NEXT) == NEXT["context"]
    assert prompt(CHOICE) == "The sky is"
    assert prompt({"query": "Passage.\nQuestion: why? "}) == "Passage.\nQuestion: why?\nAnswer:"
    assert prompt({"query": "Question: why?\nAnswer:"}) == "Question: why?\nAnswer:"
    assert [joint("a", "b"), joint("a ", "b"), joint("a", "\nb"), joint("a\n", "b")] == [" ", "", "", ""]


@pytest.mark.parametrize(
    ("line", "rule"),
    [
        (NEXT, "another shape than the lines before"),
        ("{", "not valid JSON"),
        ([1], "needs `query`, `choices` and `gold`, or `context` and `continuation`; found keys: none in a list"),
        ({"question": "?", "choices": ["a", "b"], "gold": 0}, "found keys: question, choices, gold"),
        (CHOICE | {"gold": 2}, "`gold` must be the number of the right choice, 0 to 1; found 2"),
        (CHOICE | {"gold": -1}, "found -1"),
        (CHOICE | {"gold": "blue"}, "found 'blue'"),
        (CHOICE | {"gold": True}, "found True"),
        (CHOICE | {"choices": ["blue"]}, "two texts or more"),
        (CHOICE | {"choices": "blue"}, "two texts or more"),
        (CHOICE | {"choices": ["blue", ""]}, r"`choices\[1\]` must be a string that is not empty"),
        (CHOICE | {"query": " "}, "`query` must be a string that is not empty"),
    ],
)
def test_a_bad_line_is_named_with_the_rule(tmp_path: Path, line: object, rule: str) -> None:
    with pytest.raises(CalibrationError, match=rf"bad\.jsonl, line 3: .*{rule}"):
        read_questions(write(tmp_path / "bad.jsonl", CHOICE, "", line))


def test_a_bad_continuation(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=r"bad\.jsonl, line 2: `continuation` must be a string .* found 3"):
        read_questions(write(tmp_path / "bad.jsonl", NEXT, NEXT | {"continuation": 3}))


def test_no_file_and_nothing_in_it(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=r"none\.jsonl': no such file"):
        read_questions(tmp_path / "none.jsonl")
    with pytest.raises(CalibrationError, match=r"empty\.jsonl: no record; each line needs"):
        read_questions(write(tmp_path / "empty.jsonl", " ", ""))
    (tmp_path / "broken.jsonl.gz").write_bytes(b"\x1f\x8b no gzip")
    with pytest.raises(CalibrationError, match=r"broken\.jsonl\.gz: cannot be read"):
        read_questions(tmp_path / "broken.jsonl.gz")
