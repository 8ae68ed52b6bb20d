"""Recipes: what is accepted, what is refused, and how the refusal reads."""

from pathlib import Path

import pytest
import yaml

from penjing.errors import RecipeError
from penjing.methods import METHODS
from penjing.recipe import Recipe, builtin_recipes, load_recipe

GPTQ = {"method": "gptq", "bits": 4, "group_size": 64}


def recipe(**keys: object) -> dict[str, object]:
    return {"version": 1, "steps": [GPTQ], **keys}


@pytest.mark.parametrize("name", builtin_recipes())
def test_builtin_recipe(name: str) -> None:
    loaded = load_recipe(name)
    assert loaded.summary, "the catalogue shows it"
    assert yaml.safe_load(builtin_recipes()[name])["format"] == loaded.format, "a built-in recipe spells its format"
    for step in loaded.steps:
        assert step.method in METHODS


def test_catalogue_lists_exactly_the_builtin_recipes() -> None:
    text = (Path(__file__).parents[1] / "src/penjing/recipes/README.md").read_text(encoding="utf-8")
    listed = [line.split("`")[1] for line in text.splitlines() if line.startswith("| `")]
    assert sorted(listed) == sorted(builtin_recipes())


def test_every_method_has_a_builtin_recipe_or_a_reason() -> None:
    used = {step.method for name in builtin_recipes() for step in load_recipe(name).steps}
    assert set(METHODS) - used <= {"magnitude", "pca", "nmf"}, "these are baselines that no one should ship"


@pytest.mark.parametrize("name", builtin_recipes())
def test_as_dict_reads_back_to_the_same_recipe(name: str) -> None:
    loaded = load_recipe(name)
    again = load_recipe(loaded.as_dict())
    assert again == loaded
    assert again.digest() == loaded.digest()


def test_defaults_are_spelled_out() -> None:
    written = load_recipe(recipe()).as_dict()
    assert written["calibration"]["samples"] == 128
    assert written["steps"][0]["damping"] == METHODS["gptq"].options.model_fields["damping"].default


def test_a_file_a_mapping_and_a_recipe_are_the_same(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(recipe()), encoding="utf-8")
    loaded = load_recipe(path)
    assert load_recipe(str(path)) == loaded == load_recipe(recipe()) == load_recipe(loaded)


def test_digest_follows_what_is_written_and_nothing_else() -> None:
    plain = load_recipe(recipe()).digest()
    assert load_recipe(recipe(summary="words", evaluation={"windows": 2}, require={"max_kl": 1.0})).digest() == plain
    assert load_recipe(recipe(calibration={"seed": 1})).digest() != plain
    assert load_recipe(recipe(steps=[{**GPTQ, "bits": 3}])).digest() != plain
    assert load_recipe(recipe(format="native")).digest() != plain


def test_minus_one_is_one_scale_per_row() -> None:
    step = load_recipe(recipe(steps=[{**GPTQ, "group_size": -1}])).steps[0]
    assert step.options.group_size == "channel"


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (recipe(stepz=[]), "unknown key 'stepz'; did you mean 'steps'?"),
        (recipe(calibration={"sample": 3}), "unknown key 'sample'; did you mean 'samples'?"),
        (
            recipe(steps=[{**GPTQ, "group_sise": 64}]),
            "unknown key 'group_sise'; did you mean 'group_size'?",
        ),
        (recipe(steps=[GPTQ, {"method": "gtpq"}]), "step 2: unknown method 'gtpq'; did you mean 'gptq'?"),
        (recipe(steps=[{"bits": 4}]), "step 1 needs a `method`; known methods: .*gptq"),
        (recipe(steps=[{**GPTQ, "bits": 9}]), r"step 1 \(gptq\): bits: .*less than or equal to 8"),
        (recipe(steps=[{**GPTQ, "bits": 1}]), r"step 1 \(gptq\): bits: .*greater than or equal to 2"),
        (recipe(steps=[{**GPTQ, "group_size": 0}]), r"step 1 \(gptq\): group_size"),
        (recipe(steps=[{**GPTQ, "damping": -1}]), r"step 1 \(gptq\): damping"),
        (recipe(steps=[]), "at least 1 item"),
        (recipe(steps="gptq"), "steps must be a list"),
        (recipe(version=2), "version"),
        (recipe(format="onxn"), "format"),
        (recipe(calibration={"samples": 0}), "samples"),
        (recipe(require={"max_kl": 0}), "max_kl"),
        (recipe(steps=[{"method": "shortgpt", "drop": 1, "targets": ["linear"]}]), "unknown key 'targets'"),
        (recipe(steps=[{"method": "wanda"}]), "either `sparsity`"),
        (recipe(steps=[{"method": "wanda", "sparsity": 0.5, "pattern": "2:4"}]), "either `sparsity`"),
        (recipe(steps=[{"method": "wanda", "pattern": "4:2"}]), "write N:M"),
    ],
)
def test_what_is_refused(keys: dict[str, object], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe(keys)


def test_the_message_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("version: 1\nsteps: [{method: gptq, bots: 4}]\n", encoding="utf-8")
    with pytest.raises(RecipeError, match=r"mine\.yaml: step 1 \(gptq\): unknown key 'bots'"):
        load_recipe(path)


@pytest.mark.parametrize(
    ("text", "message"), [("steps: [", "not valid YAML"), ("- method: gptq", "a recipe is a mapping"), ("", "mapping")]
)
def test_files_that_are_no_recipes(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(RecipeError, match=message):
        load_recipe(path)


def test_unknown_name_suggests_a_builtin_recipe() -> None:
    with pytest.raises(RecipeError, match="did you mean 'w4a16-gptq'"):
        load_recipe("w4a16-gtpq")


def test_recipes_are_immutable() -> None:
    loaded = load_recipe(recipe())
    with pytest.raises(ValueError, match="frozen"):
        loaded.format = "dense"  # type: ignore[misc]
    assert isinstance(loaded, Recipe)
