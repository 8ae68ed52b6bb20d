"""What a recipe asks of the machine: calibration text, memory, arithmetic. Nothing here reads a weight."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise

from penjing import statistics
from penjing.methods.training import TrainOptions
from penjing.models.layout import Layout, ModuleSpec
from penjing.numerics.output_feedback import output_bounds
from penjing.recipe import Recipe, Step

BATCH_TOKENS = 2048
"""Tokens per forward pass: enough to keep the matrix units busy, small enough for one block's intermediates."""


WRITTEN_LENGTH, WRITTEN_TOGETHER = 256, 64
"""Tokens of a text that the model writes itself for calibration, and how many texts it writes at once."""


def needs_text(recipe: Recipe) -> bool:
    """Whether any step looks at activations, or what becomes of linears is chosen by what they do to text."""
    return recipe.allocate is not None or any(
        step.definition.select
        or step.definition.remake
        or step.definition.learn
        or step.definition.tune
        or step.definition.needs(step.options)
        or has_static_inputs(step)
        for step in recipe.steps
    )


def has_static_inputs(step: Step) -> bool:
    """Whether inputs are rounded with a scale that calibration finds."""
    return step.activations is not None and not step.activations.dynamic


def needs_original(recipe: Recipe) -> bool:
    """Whether hidden states of the dense model are kept beside those of the compressed one."""
    return recipe.propagate == "original" or any(
        step.definition.learn or compares(step) for step in recipe.steps if step.definition.select is None
    )


def weighs_tokens(recipe: Recipe) -> bool:
    """Whether gradients say how much each calibration token counts in what some step looks at."""
    return recipe.calibration.token_weights == "gradient" and any(weighs(step) for step in recipe.steps)


def looks_at_gradients(recipe: Recipe) -> bool:
    """Whether there is a pass forward and back through the dense model before the walk."""
    return weighs_tokens(recipe) or any(joins_outputs(step) for step in recipe.steps)


def weighs(step: Step) -> bool:
    """Whether tokens may count differently in what a step looks at."""
    return any(statistics.weighs(kind) for kind in step.definition.needs(step.options))


def joins_outputs(step: Step) -> bool:
    """Whether a step looks at gradients that reach the outputs of linears."""
    return step.definition.joins_outputs(step.options)


def compares(step: Step) -> bool:
    """Whether the step looks at the inputs of the dense model beside those of the compressed one."""
    return any(statistics.compares(kind) for kind in step.definition.needs(step.options))


def peak_memory(recipe: Recipe, layout: Layout) -> dict[str, int]:
    """What is in memory at the worst moment, in bytes, with fp32 arithmetic (bf16 takes half of most)."""
    blocks = [layout.of_block(index) for index in range(layout.blocks)]
    block = 4 * max(sum(module.parameters for module in modules) for modules in blocks)
    outside = 4 * max((module.parameters for module in layout.modules if module.block is None), default=0)
    states = {}
    inside = {"a block: as read, as run, as packed": 3 * block}
    if needs_text(recipe):
        tokens = recipe.calibration.samples * recipe.calibration.length
        widths = sorted({module.shape[1] for modules in blocks for module in modules if module.kind == "linear"})
        if not recipe.calibration.spill:
            streams = 2 if needs_original(recipe) else 1
            states = {"hidden states of the calibration windows": streams * 4 * tokens * layout.embedding.shape[1]}
        if any(has_static_inputs(step) for step in recipe.steps):
            inside["a block as packed, decoded to measure inputs"] = block
        grams = 3 if any(compares(step) for step in recipe.steps) else 1
        inside["Gram matrices"] = grams * 4 * sum(width * width for width in widths)
        if any(statistics.StreamGap in step.definition.needs(step.options) for step in recipe.steps):
            inside["what the residual stream lost, by inputs"] = 2 * 4 * layout.embedding.shape[1] * sum(widths)
        if any(joins_outputs(step) for step in recipe.steps):
            inside["Gram matrices of gradients, their factors"] = 2 * max(map(bytes_of_gradients, blocks))
        inside["factors of the largest Gram matrix"] = 3 * 4 * widths[-1] ** 2
        inside["a batch of tokens in the block"] = 4 * BATCH_TOKENS * 4 * widths[-1]
        if any(step.definition.learn for step in recipe.steps):
            inside["activations kept for a gradient, and what is trained"] = (
                16 * BATCH_TOKENS * widths[-1] * 4 + 4 * block
            )
    if any(step.definition.rewrite for step in recipe.steps):
        largest = max(module.parameters for modules in blocks for module in modules)
        states["a matrix that is rewritten, in fp64"] = 3 * 8 * largest
    moments = [{"embedding or head": outside, **states}, {**inside, **states}]
    if needs_text(recipe) and recipe.calibration.own_windows:
        moments.append(_writing(recipe, layout))
    if looks_at_gradients(recipe):
        moments.append(_gradients(recipe, layout, block, outside))
    if any(step.definition.tune for step in recipe.steps):
        moments.append(_training(recipe, layout, block, outside))
    return max(moments, key=lambda moment: sum(moment.values()))


def _writing(recipe: Recipe, layout: Layout) -> dict[str, int]:
    """While the dense model writes text."""
    tokens = WRITTEN_TOGETHER * min(WRITTEN_LENGTH, recipe.calibration.length)
    width = layout.heads.count * layout.heads.size if layout.heads else layout.embedding.shape[1]
    return {
        "the whole model": 4 * layout.parameters,
        "keys and values, while they grow": 2 * 2 * 4 * layout.blocks * width * tokens,
        "logits of a token of each text, their running sums": 6 * 4 * WRITTEN_TOGETHER * layout.embedding.shape[0],
    }


def bytes_of_gradients(modules: Iterable[ModuleSpec]) -> int:
    """What Gram matrices, fp32 and in blocks, of gradients by the outputs of those that are linears take."""
    bounds = (output_bounds(module.shape[0]) for module in modules if module.kind == "linear")
    return sum(4 * (stop - start) ** 2 for cuts in bounds for start, stop in pairwise(cuts))


def _gradients(recipe: Recipe, layout: Layout, block: int, outside: int) -> dict[str, int]:
    """While gradients of the dense model's predictions are taken."""
    joins = any(joins_outputs(step) for step in recipe.steps)
    length, linears = recipe.calibration.length, [module for module in layout.modules if module.kind == "linear"]
    of_window = 4 * length * layout.embedding.shape[1]
    windows = windows_at_once(recipe.calibration.samples, of_window, layout.blocks)
    return {
        "a block, embedding, head": block + 2 * outside,
        "inputs of all blocks, some windows at a time": of_window * windows * (layout.blocks + 2),
        "activations of a batch": 4 * max(BATCH_TOKENS, length) * 16 * max(module.shape[0] for module in linears),
        "logits of a window and their gradients": 4 * 4 * length * layout.embedding.shape[0],
        "Gram matrices of gradients": max(map(bytes_of_gradients, map(layout.of_block, range(layout.blocks))))
        if joins
        else 0,
        "weights of the tokens": 4 * recipe.calibration.samples * length * len(linears),
    }


INPUTS_AT_ONCE = 1 << 30
"""Bytes of block inputs that gradients are taken on at once, unless the hidden states of all windows take more."""


def windows_at_once(windows: int, of_window: int, blocks: int) -> int:
    """Of `windows` that take `of_window` bytes before each of `blocks` blocks, how many go there and back together."""
    return max(1, min(windows, max(INPUTS_AT_ONCE, windows * of_window) // (blocks * of_window)))


def _training(recipe: Recipe, layout: Layout, block: int, outside: int) -> dict[str, int]:
    """While the finished model is trained: all of it in memory as codes, one block of it decoded."""
    tokens = recipe.calibration.samples * recipe.calibration.length
    width = layout.embedding.shape[1]
    return {
        "the model as codes": sum(module.parameters for module in layout.modules if module.block is not None),
        "a block: decoded, its gradients": 3 * block,
        "heads of the dense and the finished model": 2 * outside,
        "hidden states of the calibration windows": 2 * 4 * tokens * width,
        "block inputs of a batch, and a block's activations": 4
        * max(BATCH_TOKENS, recipe.calibration.length)
        * (width * layout.blocks + 16 * max(module.shape[1] for module in layout.modules if module.kind == "linear")),
        "logits": 6 * 4 * 256 * layout.embedding.shape[0],
    }


def model_training(options: TrainOptions, recipe: Recipe, layout: Layout) -> tuple[dict[str, int], float]:
    """What training a whole model has in memory, in bytes, and its floating-point operations.

    Both models lie in fp32. A teacher with blocks or units that the student lacks takes more than is said here.
    """
    trained = options.trained(layout)
    windows = min(options.micro_batch, options.batch_size)
    tokens = windows * (options.length or recipe.calibration.length)
    linears = [module for module in layout.modules if module.kind == "linear"]
    kept = 1 if options.gradient_checkpointing else layout.blocks
    width, widest = layout.embedding.shape[1], max(module.shape[1] for module in linears)
    memory = {
        "student and teacher": 2 * 4 * layout.parameters,
        "gradients and moments of what is trained": trained * (12 if options.optimizer == "adamw" else 6),
        "activations": 4 * tokens * (kept * 16 * max(width, widest) + width * layout.blocks),
        "logits and their gradients": 4 * 4 * tokens * layout.embedding.shape[0],
    }
    seen = options.steps * options.batch_size * (options.length or recipe.calibration.length)
    return memory, 8.0 * seen * layout.parameters


def there_and_back(recipe: Recipe, layout: Layout) -> tuple[dict[str, int], float]:
    """What gradients by the weights of one block after another have in memory, in bytes, and their operations."""
    tokens, length = recipe.calibration.samples * recipe.calibration.length, recipe.calibration.length
    block = 4 * max(sum(module.parameters for module in layout.of_block(index)) for index in range(layout.blocks))
    width = layout.embedding.shape[1]
    widest = max(module.shape[0] for module in layout.modules if module.kind == "linear")
    memory = {
        "inputs of all blocks, in fp32": 4 * tokens * width * (layout.blocks + 2),
        "a block, its gradients, their means": 6 * block,
        "activations of a window": 4 * length * 16 * max(width, widest),
        "logits of a window and their gradients": 4 * 4 * length * layout.embedding.shape[0],
    }
    return memory, 8.0 * tokens * layout.parameters


def operations(recipe: Recipe, modules: Sequence[tuple[ModuleSpec, Sequence[int]]]) -> float:
    """Floating-point operations of forward passes, Gram matrices and training; the rest is small beside them.

    modules  every module of the model with the numbers of the recipe's steps that apply to it
    """
    if not needs_text(recipe):
        return 0.0
    tokens = recipe.calibration.samples * recipe.calibration.length
    linears = [(module, steps) for module, steps in modules if module.kind == "linear"]
    forward = 2.0 * sum(module.parameters for module, _ in linears)
    widths = [module.shape[1] for module, steps in linears if steps]
    passes = sum(step.definition.passes(step.options, recipe.calibration.samples) for step in recipe.steps)
    passes += 3 if looks_at_gradients(recipe) else 0
    if recipe.allocate is not None:
        passes += 2 * min(1.0, recipe.allocate.samples / recipe.calibration.samples)
    passes += 3 * recipe.calibration.written  # token by token, far from the rate of large matrices
    return tokens * ((2 + passes) * forward + sum(width * width for width in widths) / 2)
