"""Recipes that say `allocate`: every linear gets its share when the work begins, in no more bytes than without."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from penjing.checkpoint import write_bytes
from penjing.checkpoint.base import Checkpoint
from penjing.errors import PlanError
from penjing.methods.allocation.evopress import Search
from penjing.models.layout import Layout
from penjing.pipeline.allocation import allocate
from penjing.pipeline.choices import read_choices
from penjing.pipeline.menu import Menu
from penjing.pipeline.prices import Budget, prices
from penjing.progress import Progress
from penjing.recipe import Recipe, load_recipe


def require_room(checkpoint: Checkpoint, layout: Layout, recipe: Recipe) -> None:
    """Raise PlanError if what the recipe's `allocate` asks for has no answer; nothing is measured."""
    if recipe.allocate is None:
        return
    if layout.encoder:
        raise PlanError("`allocate` measures what becomes of the next token, which an encoder does not predict")
    plain = recipe.model_copy(update={"allocate": None})
    menu = Menu.open(checkpoint, layout, plain, read_choices(recipe.allocate.choices))
    prices(menu, Budget(bytes=menu.whole.bytes))


def with_shares(
    path: Path,
    checkpoint: Checkpoint,
    layout: Layout,
    recipe: Recipe,
    size: int,
    tokens: Tensor,
    progress: Progress,
    *,
    trust_remote_code: bool = False,
) -> Recipe:
    """The recipe in which every linear has its share, from the file that an interrupted run left, or measured and kept.

    path    of that file
    size    bytes that the recipe takes without `allocate`
    tokens  calibration windows (S, T)
    """
    wanted = recipe.allocate
    if wanted is None:
        return recipe
    if not path.is_file():
        found = allocate(
            checkpoint,
            layout,
            recipe,
            budget=Budget(bytes=size),
            choices=read_choices(wanted.choices),
            by=wanted.by,
            search=Search(generations=0),
            progress=progress,
            text=lambda: tokens[: wanted.samples],
            trust_remote_code=trust_remote_code,
        )
        write_bytes(path, found.recipe_text().encode())
    return load_recipe(path)
