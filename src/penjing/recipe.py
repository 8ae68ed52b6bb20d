"""A recipe is data: a list of steps, what to calibrate on, which format to write. Unknown keys are errors.

version: 1
steps:
  - method: shortgpt
    drop: 4
  - method: gptq
    targets: [linear]
    ignore: ["*.down_proj"]
    bits: 4
    group_size: 64
calibration: {data: corpus.txt, samples: 128, length: 2048, seed: 0}
format: compressed-tensors
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from penjing.errors import RecipeError
from penjing.methods import METHODS
from penjing.methods.base import ActivationOptions, Method, Options
from penjing.methods.quantization.kivi import KVCache


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Calibration(_Section):
    """The text whose activations the methods see."""

    data: str = Field("builtin", description="`builtin`, a text or JSONL file, a directory of them, or a hub data set")
    samples: int = Field(128, ge=1, description="number of windows")
    written: float = Field(0.0, ge=0, le=1, description="share of the windows that the dense model writes itself")
    length: int = Field(2048, ge=2, description="tokens per window")
    seed: int = Field(0, ge=0, description="chooses the windows")
    chat_template: bool = Field(False, description="render records that hold messages with the model's chat template")
    token_weights: Literal["alike", "gradient"] = Field(
        "alike",
        description="how much each token counts in Gram matrices: all alike, or by the gradient that reaches a linear "
        "through it, from one more pass forward and back through the dense model",
    )
    spill: bool = Field(False, description="keep the windows' hidden states in a file beside the output, not in memory")

    @property
    def own_windows(self) -> int:
        """How many of the windows the dense model writes."""
        return round(self.written * self.samples)


class Allocate(_Section):
    """What every linear becomes, chosen by measured losses within the bytes that the recipe takes as it stands."""

    choices: str = Field("2,3,4,6,8", description="bits and other words, as for `penjing allocate --choices`")
    by: Literal["output", "gradient", "kl"] = Field(
        "gradient", description="estimate of losses: relative output error, expected from gradients, measured KL"
    )
    samples: int = Field(16, ge=1, description="how many of the calibration windows losses are measured on")


class Evaluation(_Section):
    """The text on which the result is compared with the dense model. Must not be the calibration text."""

    data: str = Field("builtin", description="as for calibration; the built-in text has a part of its own for this")
    windows: int = Field(8, ge=1, description="number of windows, from the start of the text")
    length: int = Field(2048, ge=2, description="tokens per window")


class Requirements(_Section):
    """Limits on what may be lost; a result beyond them makes `compress` fail with exit code 4."""

    max_kl: float | None = Field(None, gt=0, description="mean KL(dense || compressed) per token, in nats")
    max_perplexity_ratio: float | None = Field(None, gt=0, description="perplexity over the dense model's")
    max_bytes: int | None = Field(None, gt=0, description="bytes of the weight files")


class Step(_Section):
    """One method with its options and the modules it applies to."""

    method: str
    options: Options
    targets: tuple[str, ...] = Field(
        ("linear",), description="`linear`, `embedding`, `lm_head`, module names, or globs"
    )
    ignore: tuple[str, ...] = Field((), description="modules to leave out, named in the same ways")
    activations: ActivationOptions | None = Field(None, description="also round the inputs at run time")
    position: int = Field(1, exclude=True, repr=False)

    @property
    def label(self) -> str:
        """What messages call it: "step 2 (gptq)"."""
        return f"step {self.position} ({self.method})"

    @property
    def definition(self) -> Method:
        """The row of `METHODS` this step names."""
        return METHODS[self.method]

    def as_dict(self) -> dict[str, Any]:
        """The step as it would be written in YAML, every default spelled out."""
        step: dict[str, Any] = {"method": self.method, **self.options.model_dump(mode="json")}
        if not self.definition.on_model:
            step |= {"targets": list(self.targets), "ignore": list(self.ignore)}
        if self.activations:
            step["activations"] = self.activations.model_dump(mode="json")
        return step


@dataclass(frozen=True)
class Stage:
    """Steps that share one walk over a model, and the step after them that makes another model of what they left."""

    steps: tuple[Step, ...]
    remake: Step | None


FormatName = Literal["dense", "compressed-tensors", "gptq", "gptq-v2", "awq", "bitsandbytes", "gguf", "onnx", "native"]


class Recipe(_Section):
    """A validated recipe."""

    version: Literal[1] = 1
    summary: str = ""
    steps: tuple[Step, ...] = Field(min_length=1)
    calibration: Calibration = Calibration()
    allocate: Allocate | None = None
    evaluation: Evaluation = Evaluation()
    require: Requirements = Requirements()
    kv_cache: KVCache | None = Field(
        None, description="the cache that the result is measured with and whose settings its config.json carries"
    )
    format: FormatName = Field("compressed-tensors", description="how the result lies on disk; `penjing list formats`")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="of the tensors that stay dense and of scales; `auto`: the model's own"
    )
    propagate: Literal["compressed", "original"] = Field(
        "compressed",
        description="what the next block is calibrated on: outputs of the compressed block or the original",
    )
    on_unsupported: Literal["error", "dense"] = Field(
        "error", description="a module that the format cannot hold: refuse, or leave it dense and report it"
    )

    @field_validator("steps", mode="before")
    @classmethod
    def _parse_steps(cls, steps: object) -> list[Step]:
        if not isinstance(steps, list | tuple) or not steps:
            raise ValueError("steps must be a list with at least 1 item")
        return [step if isinstance(step, Step) else _parse_step(number, step) for number, step in enumerate(steps, 1)]

    def stages(self) -> tuple[Stage, ...]:
        """The steps, cut after each that makes another model; the last stage ends with none of those."""
        stages: list[Stage] = []
        start = 0
        for number, step in enumerate(self.steps):
            if step.definition.remake is not None:
                stages.append(Stage(self.steps[start:number], step))
                start = number + 1
        return (*stages, Stage(self.steps[start:], None))

    def as_dict(self) -> dict[str, Any]:
        """The recipe with every default spelled out; `Recipe.model_validate` reads it back."""
        return {**self.model_dump(mode="json", exclude={"steps"}), "steps": [step.as_dict() for step in self.steps]}

    def cautions(self, parameters: int) -> list[str]:
        """What it and its methods say of themselves on a model of so many parameters; the same words once."""
        said = {step.definition.caution(step.options, parameters): step.label for step in reversed(self.steps)}
        told = [f"{label}: {words}" for words, label in reversed(said.items()) if words]
        if self.allocate is not None:
            told.append(f"allocate: each linear gets one of {self.allocate.choices} by measured losses; no byte more")
        return told

    def digest(self) -> str:
        """Changes when anything that affects the written weights changes."""
        relevant = self.as_dict()
        for key in ("summary", "evaluation", "require", "kv_cache"):
            del relevant[key]
        del relevant["calibration"]["spill"]
        return hashlib.sha256(json.dumps(relevant, sort_keys=True).encode()).hexdigest()


def _parse_step(number: int, step: object) -> Step:
    if not isinstance(step, dict) or "method" not in step:
        raise ValueError(f"step {number} needs a `method`; known methods: {', '.join(METHODS)}")
    keys = dict(step)
    name = keys.pop("method")
    if name not in METHODS:
        raise ValueError(f"step {number}: unknown method {name!r}{did_you_mean(str(name), METHODS)}")
    method = METHODS[name]
    shared = () if method.on_model else ("targets", "ignore", "activations")
    own = {key: keys.pop(key) for key in shared if key in keys}
    known = [*method.options.model_fields, *shared]
    for key in keys:
        if key not in known:
            raise ValueError(f"step {number} ({name}): unknown key {key!r}{did_you_mean(str(key), known)}")
    try:
        return Step(method=name, options=method.options.model_validate(keys), position=number, **own)
    except ValidationError as error:
        raise ValueError(f"step {number} ({name}): {_first_problem(error)}") from error


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The end of an error message: the closest known word, or all of them."""
    known = list(known)
    close = difflib.get_close_matches(word, known, 1)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(known)}"


def _first_problem(error: ValidationError) -> str:
    problem = error.errors()[0]
    where = ".".join(str(part) for part in problem["loc"])
    message = problem["msg"].removeprefix("Value error, ")
    return f"{where}: {message}" if where and where != "steps" else message


def builtin_recipes() -> dict[str, str]:
    """Name -> YAML text of the recipes that come with Penjing."""
    folder = resources.files("penjing") / "recipes"
    return {
        entry.name.removesuffix(".yaml"): entry.read_text(encoding="utf-8")
        for entry in sorted(folder.iterdir(), key=lambda entry: entry.name)
        if entry.name.endswith(".yaml")
    }


def load_recipe(source: str | Path | dict[str, Any] | Recipe) -> Recipe:
    """A recipe from a built-in name, a YAML file, a mapping, or a recipe.

    Raises RecipeError that names the step, the key and what is known.
    """
    if isinstance(source, Recipe):
        return source
    label = "recipe"
    if not isinstance(source, dict):
        label, source = str(source), _read(source)
    try:
        return Recipe.model_validate(source)
    except ValidationError as error:
        problem = error.errors()[0]
        if problem["type"] == "extra_forbidden":
            key = str(problem["loc"][-1])
            section = Recipe.model_fields.get(str(problem["loc"][0]))
            known = Recipe.model_fields if len(problem["loc"]) == 1 or section is None else _keys_of(section.annotation)
            raise RecipeError(f"{label}: unknown key {key!r}{did_you_mean(key, known)}") from error
        raise RecipeError(f"{label}: {_first_problem(error)}") from error


def _keys_of(annotation: Any) -> list[str]:
    kinds = get_args(annotation) or (annotation,)
    return [key for kind in kinds for key in getattr(kind, "model_fields", {})]


def _read(source: str | Path) -> dict[str, Any]:
    path = Path(source)
    known = builtin_recipes()
    if str(source) in known:
        text = known[str(source)]
    elif path.is_file():
        text = path.read_text(encoding="utf-8")
    else:
        raise RecipeError(f"no recipe file or built-in recipe called {str(source)!r}{did_you_mean(str(source), known)}")
    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"{source}: not valid YAML: {error}") from error
    if not isinstance(data, dict):
        raise RecipeError(f"{source}: a recipe is a mapping with `version` and `steps`, found {type(data).__name__}")
    return data
