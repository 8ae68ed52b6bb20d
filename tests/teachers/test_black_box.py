"""Loops with teachers that are functions: reasons in three ways, Lion's rounds."""

import pytest

from penjing.errors import TeacherError
from penjing.methods.distillation.rationale import Question
from penjing.teachers import Reply
from penjing.teachers.lion import discriminate, generate, imitation_records
from penjing.teachers.rationales import collect_reasons

QUESTIONS = [Question("1+1", "2"), Question("2+2", "4"), Question("3+3", "6")]


class Scripted:
    """Answers by a function of the prompt and the sample, and counts."""

    def __init__(self, answer, name="scripted"):
        self.answer, self.name, self.asked = answer, name, 0

    def __call__(self, request):
        self.asked += 1
        found = self.answer(request)
        return found if isinstance(found, Reply) else Reply(found)


def thinks(request):
    if "The answer is" in request.prompt:
        return "told"
    if "3+3" in request.prompt:
        return Reply("cut off\nAnswer: 6", finished=False)
    return "thought\nAnswer: " + ("2" if "1+1" in request.prompt else "5")


@pytest.mark.parametrize(
    ("way", "wanted", "asked"),
    [("cote", ["thought"], 3), ("rp", ["told"] * 3, 3), ("crop", ["thought", "told", "told"], 5)],
)
def test_reasons_are_kept_if_they_lead_to_the_answer(way, wanted, asked, tmp_path):
    teacher = Scripted(thinks)
    for _ in range(2):
        kept = collect_reasons(teacher, QUESTIONS, tmp_path / "asked.jsonl", way)
        assert [reasons for _, reasons in kept] == wanted and kept[0][0] == QUESTIONS[0]
    assert teacher.asked == asked


def test_hard_instructions_are_found_whatever_the_order(tmp_path):
    def judge(request):
        first = request.prompt.split("[Answer 1]\n")[1].split("\n")[0]
        if request.sample == 0 and "easy" in request.prompt:
            return "let me think"
        quality = {"good": 8, "poor": 4, "same": 6}
        second = request.prompt.split("[Answer 2]\n")[1].split("\n")[0]
        return f"{quality[first] + 1} {quality[second]}"

    referee = Scripted(judge)
    gaps = discriminate(["hard one", "easy one"], ["good", "same"], ["poor", "same"], referee, tmp_path / "r.jsonl")
    assert gaps == {"hard one": 4, "easy one": 0}
    assert referee.asked == 4, "equal answers are one question"
    with pytest.raises(TeacherError, match="gave no two scores"):
        discriminate(["x"], ["a"], ["b"], Scripted(lambda request: "no"), tmp_path / "n.jsonl")


def test_new_instructions_come_from_both_kinds(tmp_path):
    words = iter(["bake a fine bread", "bake a fine bread", "tell me a long story", "cut", "draw a map of rome"])
    writer = Scripted(lambda request: next(words, "cut"))
    hard, easy = generate({"hard one": 2.0, "easy one": 0.0}, writer, tmp_path / "g.jsonl", 2)
    assert hard == ["bake a fine bread", "tell me a long story"] and easy == ["draw a map of rome"]
    assert writer.asked < 30


def test_only_whole_answers_are_imitated(tmp_path):
    teacher = Scripted(lambda request: Reply("yes", finished=request.prompt != "b"))
    assert imitation_records(teacher, ["a", "b"], tmp_path / "i.jsonl") == [{"prompt": "a", "response": "yes"}]
