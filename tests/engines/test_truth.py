"""What is on file about engines, and what a plan makes of it."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import penjing
from penjing.engines import ENGINES, truth
from penjing.engines.truth import Fact, judge, known
from penjing.errors import EngineError, PlanError
from penjing.models.families import FAMILIES

ROOT = Path(__file__).parents[2]
GOOD = Fact("transformers", "5", "llama", "native", "W4", True, True, 1e-9, None, None, "", "2026-11-21")


def test_facts_are_about_engines_formats_and_architectures_that_exist() -> None:
    facts = known()
    assert len({fact.key for fact in facts}) == len(facts)
    for fact in facts:
        assert fact.format in ENGINES[fact.engine].formats
        assert fact.architecture in FAMILIES
        assert bool(fact.reason) == (not fact.loads or fact.verified is not True)


def test_the_page_follows_the_data() -> None:
    done = subprocess.run([sys.executable, ROOT / "scripts/truth.py", "--check"], capture_output=True, cwd=ROOT)
    assert done.returncode == 0, "run python scripts/truth.py --page"


@pytest.fixture
def on_file(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    def put(*facts: Fact) -> None:
        monkeypatch.setattr(truth, "known", lambda: facts)

    return put


def test_judgements(on_file: Callable[..., None]) -> None:
    from dataclasses import replace

    broken = replace(GOOD, scheme="W3", loads=False, verified=None, reason="it said no")
    wrong = replace(GOOD, scheme="W2", verified=False, reason="other logits")
    slow = replace(GOOD, scheme="W8", prefill=0.5, decode=0.9)
    on_file(GOOD, broken, wrong, slow)
    assert judge("transformers", "llama", "native", ["W4", "W4"]) == []
    assert "never tried on gemma2" in judge("transformers", "gemma2", "native", ["W4"])[0]
    assert "not faster" in judge("transformers", "llama", "native", ["W8"])[0]
    for scheme, reason in (("W3", "it said no"), ("W2", "other logits")):
        with pytest.raises(PlanError, match=reason):
            judge("transformers", "llama", "native", [scheme])
    with pytest.raises(PlanError, match=r"vllm does not load format native; it loads .*compressed-tensors"):
        judge("vllm", "llama", "native", ["W4"])
    with pytest.raises(EngineError, match="no engine called 'gpu'"):
        judge("gpu", "llama", "native", ["W4"])


def test_plan_for_an_engine(on_file: Callable[..., None], tiny_model: Callable[..., Path]) -> None:
    on_file()
    plan = penjing.plan(tiny_model("llama"), "w8a16-rtn", engine="vllm")
    assert any("vllm was never tried on llama" in warning for warning in plan.warnings)
    with pytest.raises(PlanError, match="llamacpp does not load format"):
        penjing.plan(tiny_model("llama"), "w8a16-rtn", engine="llamacpp")
