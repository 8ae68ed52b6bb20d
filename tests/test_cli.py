"""The command line: help, lists, overrides, JSON, errors and their exit codes. What verbs do is tested elsewhere."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import penjing
from penjing import api, cli
from penjing.cli.command import VERBS
from penjing.engines import ENGINES
from penjing.errors import CheckpointError, QualityError, VerificationError
from penjing.formats import FORMATS
from penjing.methods import METHODS
from penjing.models.families import FAMILIES
from penjing.recipe import Recipe, builtin_recipes

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def invoke(*args: object) -> tuple[int, str, str]:
        code = cli.main([str(arg) for arg in args])
        return code, *capsys.readouterr()

    return invoke


def test_version(run: Run) -> None:
    assert run("--version") == (0, f"penjing {penjing.__version__}\n", "")


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_every_verb(run: Run, verb: str) -> None:
    assert verb in run("--help")[1]
    code, out, err = run(verb, "--help")
    assert code == 0, err
    assert "--json" in out


@pytest.mark.parametrize(
    ("what", "key", "names"),
    [
        ("methods", "name", METHODS),
        ("recipes", "name", builtin_recipes()),
        ("formats", "name", FORMATS),
        ("architectures", "model_type", FAMILIES),
        ("engines", "name", ENGINES),
    ],
)
def test_lists(run: Run, what: str, key: str, names: dict[str, object]) -> None:
    code, out, err = run("list", what, "--json")
    assert (code, err) == (0, "")
    assert [row[key] for row in json.loads(out)] == list(names)
    shown = run("list", what)[1]
    assert all(name in shown for name in names)


def test_plan_json_is_all_there_is_on_stdout(run: Run, tiny_model: Callable[..., Path]) -> None:
    code, out, err = run("plan", tiny_model("llama"), "-r", "w8a16-rtn", "--json")
    assert code == 0, err
    result = json.loads(out)
    names = [module["name"] for module in result["modules"]]
    assert result["blocks"] == len({name.split(".")[2] for name in names if name.startswith("model.layers.")})
    assert result["predicted_bytes"] < result["dense_bytes"]


def test_plan_table_gathers_blocks(run: Run, tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    code, out, err = run("plan", tiny_model("llama"), "-r", "w8a16-rtn")
    assert code == 0, err
    assert "*.mlp.down_proj" in out
    assert "model.layers.1." not in out


def test_inspect(run: Run, tiny_model: Callable[..., Path]) -> None:
    code, out, err = run("inspect", tiny_model("llama"), "--json")
    assert code == 0, err
    assert json.loads(out)["family"] == "llama"
    assert "llama" in run("inspect", tiny_model("llama"))[1]


class Planned:
    """Stands in for a plan and keeps the recipe it was asked for."""

    recipe: Recipe

    def __call__(self, model: str, recipe: Recipe, **_: Any) -> "Planned":
        self.recipe = recipe
        print("a library that prints")
        return self

    def as_dict(self) -> dict[str, Any]:
        return {"fine": True}


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch) -> Planned:
    stand_in = Planned()
    monkeypatch.setattr(api, "plan", stand_in)
    return stand_in


def test_overrides_reach_the_recipe(run: Run, planned: Planned) -> None:
    given = ("--data", "notes.txt", "--samples", 3, "--length", 77, "--seed", 5, "--format", "native")
    assert run("plan", "demo", "-r", "w4a16-gptq", "--json", *given)[0] == 0
    calibration = planned.recipe.calibration
    assert (calibration.data, calibration.samples, calibration.length, calibration.seed) == ("notes.txt", 3, 77, 5)
    assert planned.recipe.format == "native"


def test_what_libraries_print_stays_out_of_the_result(run: Run, planned: Planned) -> None:
    _, out, err = run("plan", "demo", "-r", "w4a16-gptq", "--json")
    assert json.loads(out) == {"fine": True}
    assert "a library that prints" in err


def test_override_is_validated(run: Run) -> None:
    code, _, err = run("plan", "demo", "-r", "w4a16-gptq", "--format", "onxn")
    assert code == 2
    assert "format" in err


def test_bad_usage(run: Run) -> None:
    assert run("plan", "demo")[0] == 2
    assert run("plan", "demo", "-r", "w4a16-gptq", "--samples", "0")[0] == 2
    assert run("squeeze")[0] == 2


def test_unknown_recipe_is_one_line_with_a_suggestion(run: Run) -> None:
    code, out, err = run("plan", "demo", "-r", "w4a16-gtpq")
    assert (code, out) == (2, "")
    assert err.startswith("error: no recipe file or built-in recipe called 'w4a16-gtpq'")
    assert "did you mean 'w4a16-gptq'" in err
    assert err.count("\n") == 1


def test_missing_model(run: Run, tmp_path: Path) -> None:
    code, out, err = run("inspect", tmp_path / "nothing")
    assert (code, out) == (2, "")
    assert "nothing" in err


@pytest.mark.parametrize(
    ("raised", "code", "message"),
    [
        (CheckpointError("[brackets] and \\ are kept"), 2, "[brackets] and \\ are kept"),
        (VerificationError("differs"), 3, "differs"),
        (QualityError("worse"), 4, "worse"),
        (ZeroDivisionError("oops"), 1, "bug in Penjing"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_exit_codes(run: Run, monkeypatch: pytest.MonkeyPatch, raised: BaseException, code: int, message: str) -> None:
    def fail(*_: object, **__: object) -> None:
        raise raised

    monkeypatch.setattr(api, "inspect", fail)
    found, out, err = run("inspect", "demo")
    assert (found, out) == (code, "")
    assert message in err
    assert "Traceback" not in err


def test_debug_shows_the_traceback_wherever_it_stands(run: Run) -> None:
    for args in (("--debug", "plan", "demo", "-r", "nope"), ("plan", "demo", "-r", "nope", "--debug")):
        code, _, err = run(*args)
        assert code == 2
        assert "Traceback" in err


def test_progress_goes_to_stderr(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def verify(directory: Path, progress: Callable[..., None], **_: object) -> Planned:
        progress("verify", 1, 2)
        progress("verify", 2, 2, "model.layers.1")
        return Planned()

    monkeypatch.setattr(api, "verify", verify)
    code, out, err = run("verify", tmp_path, "--json")
    assert code == 0, err
    assert json.loads(out) == {"fine": True}
    assert "verify" in err
    assert "model.layers.1" in err


@pytest.mark.parametrize("verb", ["bench", "chat", "serve", "export"])
def test_verbs_of_engines_on_a_missing_model(run: Run, verb: str, tmp_path: Path) -> None:
    given = ("--to", "dense", "-o", tmp_path / "out") if verb == "export" else ()
    code, out, err = run(verb, tmp_path / "nothing", *given)
    assert (code, out) == (2, "")
    assert "no such file or directory" in err
    assert verb == "chat" or err.startswith("error:")  # a bar of no stage would leave an empty line


@pytest.mark.parametrize("verb", ["bench", "chat", "verify"])
def test_an_engine_that_is_not_there(run: Run, verb: str, tiny_model: Callable[..., Path], monkeypatch: Any) -> None:
    monkeypatch.setattr(type(ENGINES["vllm"]), "version", lambda self: None)
    code, out, err = run(verb, tiny_model("llama"), "--engine", "vllm")
    assert (code, out) == (2, "")
    assert "pip install vllm" in err
    code, out, err = run(verb, tiny_model("llama"), "--engine", "lamacpp")
    assert (code, out) == (2, "")
    assert "did you mean 'llamacpp'" in err


def test_bench_wants_numbers(run: Run) -> None:
    assert run("bench", "demo", "--batch", "1,x")[0] == 2
    assert run("bench", "demo", "--length", "0")[0] == 2


def test_a_damaged_gguf_file(run: Run, tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    code, out, err = run("bench", tmp_path / "model.gguf", "--engine", "transformers")
    assert (code, out) == (2, "")
    assert "model.gguf" in err
    assert "bug in Penjing" not in err


def test_bench_and_verification_tables(monkeypatch: pytest.MonkeyPatch, run: Run) -> None:
    from penjing.engines.bench import Bench, Load, Row, Speed, Spread
    from penjing.pipeline.engine_check import Difference, EngineCheck

    spread = Spread(120.0, 110.0, 130.0)
    row = Row("m", "llamacpp", "1", "auto", 10**6, 0.5, 10**7, 10**6, 5 * 10**5, 200.0, (Speed(1, 8, spread, spread),))
    monkeypatch.setattr(api, "bench", lambda *_, **__: Bench(1, 1e8, Load(), (row,), ("m in vllm: no",)))
    monkeypatch.setenv("COLUMNS", "160")
    code, out, err = run("bench", "m")
    assert code == 0, err
    assert "120 (110 to 130)" in out
    assert "60%" in out
    assert "left out: m in vllm: no" in out
    found = EngineCheck("m", "e", "1", "m", 9, 0.001, 0.9, 0.01, (Difference(0, 3, 5, 7, (0.4, 0.3)),), 0.02)
    monkeypatch.setattr(api, "verify", lambda *_, **__: found)
    code, out, err = run("verify", "m", "--engine", "e")
    assert code == 0, err
    assert "0.4000 and 0.3000" in out
    assert json.loads(run("verify", "m", "--engine", "e", "--json")[1])["passed"]
