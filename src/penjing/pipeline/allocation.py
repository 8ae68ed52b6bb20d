"""Who gets how much under one budget: which choices there are, what they cost, the recipe that comes out.

The outcome is an ordinary recipe whose steps name their targets. Linears that engines merge (q, k, v; gate, up) and the
experts of a block share a choice. Everything that can be refused is refused before a weight is read.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from penjing.checkpoint.base import Checkpoint
from penjing.errors import PlanError
from penjing.methods.allocation.blocks import knapsack_of_blocks
from penjing.methods.allocation.evopress import Search, evopress
from penjing.methods.allocation.knapsack import knapsack
from penjing.models.layout import Layout
from penjing.numerics.precision import compute_dtype
from penjing.pipeline.choices import Choice
from penjing.pipeline.evolution import Database, Mixtures
from penjing.pipeline.gradients import PROBE_LENGTH
from penjing.pipeline.menu import Menu
from penjing.pipeline.prices import WORDS, Budget, Prices, blocks_of, prices
from penjing.pipeline.removals import losses_without
from penjing.pipeline.rewritten import RewrittenCheckpoint
from penjing.pipeline.sensitivity import PROBE_WINDOWS, Question, Sensitivity, SensitivityWalk
from penjing.pipeline.stream import StreamedModel
from penjing.planning import Plan, make_plan
from penjing.progress import Progress
from penjing.recipe import Recipe

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def read_bytes(size: int | str) -> int:
    """A number of bytes from words such as "80MB", "1.5 GiB" or "80000000". Raises PlanError for an unknown unit."""
    if isinstance(size, int):
        return size
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", size)
    if match is None:
        raise PlanError(f"a budget of {size!r} is no size; write a number and a unit, such as 80MB")
    if match[2].upper() not in _UNITS:
        raise PlanError(
            f"unknown unit {match[2]!r} in the budget {size!r}; known: B, kB, MB, GB, TB, KiB, MiB, GiB, TiB"
        )
    return int(float(match[1]) * _UNITS[match[2].upper()])


SEARCH_WINDOWS = (1, 4)
"""Windows of text, of `PROBE_LENGTH` tokens, on which a search judges: many offspring, then the few that are left."""

MEANINGS: Mapping[Sensitivity, str] = {
    "output": "change of each linear's output over the output, squared, summed over linears",
    "gradient": "KL to the dense model in nats per token, expected from gradients, summed over linears",
    "kl": "KL to the dense model in nats per token, measured one unit at a time, summed",
}
"""What the loss counts, by estimate."""


@dataclass(frozen=True)
class Share:
    """One unit: what it got, and what the other choices would have cost. All lists run over the choices.

    costs  in the measure of the budget
    gone   its block was removed, and `chosen` means nothing
    """

    modules: tuple[str, ...]
    parameters: int
    chosen: int
    bytes: tuple[int, ...]
    losses: tuple[float, ...]
    costs: tuple[int, ...]
    gone: bool = False


@dataclass(frozen=True)
class Allocation:
    """The recipe that spends a budget best, and what led to it.

    recipe   ordinary, ready for `compress`
    plan     what it will do
    prices   the budget and what everything costs in its measure; `cost` is at most `budget`
    by       how losses were estimated: nats per token for `gradient` and `kl`, a ratio for `output`
    refined  measured KL of the knapsack's mixture and of what the search made of it; None without a search
    uniform  bytes of the model with one choice everywhere, by choice
    removed  blocks that go, and the loss of the model without each
    """

    recipe: Recipe
    plan: Plan
    prices: Prices
    by: Sensitivity
    choices: tuple[Choice, ...]
    shares: tuple[Share, ...]
    uniform: tuple[int, ...]
    refined: tuple[float, float] | None = None
    removed: Mapping[int, float] = field(default_factory=dict)

    @property
    def kept(self) -> list[Share]:
        """Units of the blocks that stay."""
        return [share for share in self.shares if not share.gone]

    @property
    def budget(self) -> int:
        """What the whole model may take, in the measure of the prices: bytes, parameters or nanoseconds."""
        return self.prices.limit

    @property
    def cost(self) -> int:
        """What it takes."""
        gone = sum(self.prices.rests[block] for block in self.removed)
        return self.prices.fixed - gone + sum(share.costs[share.chosen] for share in self.kept)

    @property
    def bits(self) -> float:
        """Bits per weight of the linears that were allocated, with scales and all else that is stored for them."""
        return 8 * sum(share.bytes[share.chosen] for share in self.kept) / sum(share.parameters for share in self.kept)

    @property
    def loss(self) -> float:
        """Predicted: the sum of the losses of all units, and of the blocks that go."""
        return sum(share.losses[share.chosen] for share in self.kept) + sum(self.removed.values())

    def uniform_loss(self, choice: int) -> float:
        """Predicted for one choice everywhere."""
        return sum(share.losses[choice] for share in self.shares)

    def recipe_text(self) -> str:
        """The recipe in YAML."""
        return yaml.safe_dump(self.recipe.as_dict(), sort_keys=False)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        names = [str(choice) for choice in self.choices]
        return {
            "model": self.plan.label,
            "format": self.recipe.format,
            "by": self.by,
            "loss_meaning": MEANINGS[self.by],
            "choices": names + ["drop"] * bool(self.prices.rests),
            "removed_blocks": {str(block): loss for block, loss in self.removed.items()},
            "measure": self.prices.measure,
            "budget": self.budget,
            "cost": self.cost,
            "predicted_bytes": self.plan.bytes,
            "bits_per_weight": self.bits,
            "predicted_loss": self.loss,
            "searched_kl": None if self.refined is None else dict(zip(("before", "after"), self.refined, strict=True)),
            "uniform": [
                {"choice": name, "bytes": size, "cost": cost, "loss": self.uniform_loss(number)}
                | {"fits": cost <= self.budget}
                for number, (name, size, cost) in enumerate(zip(names, self.uniform, self.prices.totals, strict=True))
            ],
            "units": [
                {
                    "modules": list(share.modules),
                    "choice": "drop" if share.gone else names[share.chosen],
                    "bytes": 0 if share.gone else share.bytes[share.chosen],
                    "losses": dict(zip(names, share.losses, strict=True)),
                }
                for share in self.shares
            ],
            "recipe": self.recipe.as_dict(),
        }


def allocate(
    checkpoint: Checkpoint,
    layout: Layout,
    recipe: Recipe,
    *,
    budget: Budget,
    choices: Sequence[Choice],
    by: Sensitivity,
    search: Search,
    progress: Progress,
    text: Callable[[], Tensor],
    trust_remote_code: bool = False,
) -> Allocation:
    """Measure, solve, refine if the search has generations, and write the recipe.

    text  the token windows (S, T) to measure on, asked for once nothing is left to be refused

    Raises PlanError before anything is measured when no answer is possible.
    """
    menu = Menu.open(checkpoint, layout, recipe.model_copy(update={"allocate": None}), choices)
    if menu.drops and by == "output":
        raise PlanError("`drop` is judged by the KL divergence of the model without a block; use `by` gradient or kl")
    price = prices(menu, budget)
    tokens = text()
    rewriting = menu.whole.rewriting
    source = checkpoint if rewriting is None else RewrittenCheckpoint(checkpoint, rewriting, "allocate")
    with tempfile.TemporaryDirectory() as folder:
        database = Database(Path(folder))
        walk = SensitivityWalk(
            source,
            menu.layout,
            Question(menu.units, menu.plans, by, price.nearest()),
            tokens,
            dtype=compute_dtype(),
            progress=progress,
            store=database.add if search.generations else None,
            trust_remote_code=trust_remote_code,
        )
        solved = _solve(menu, price, walk.run(), walk.stream, tokens, progress)
        if search.generations:
            solved = _refine(solved, menu, price, walk.stream, database, tokens, search, progress)
    final = menu.assemble(solved.chosen, list(solved.removed))
    if final is None:
        raise PlanError(f"every linear fits in {price.limit:,} {WORDS[price.measure]} as it is; there is nothing to do")
    plan = make_plan(checkpoint, layout, final)
    found = Allocation(
        final,
        plan,
        price,
        by,
        menu.choices,
        _shares(menu, price, solved),
        menu.totals,
        solved.refined,
        dict(solved.removed),
    )
    summary = f"{found.bits:.3f} bits per weight, allocated by {by} loss"
    return replace(found, recipe=final.model_copy(update={"summary": summary}))


@dataclass(frozen=True)
class _Solved:
    """Losses by unit and choice, the choice of every unit, blocks that go with the loss without each."""

    losses: Sequence[Sequence[float]]
    chosen: Sequence[int]
    removed: Mapping[int, float]
    refined: tuple[float, float] | None = None


def _shares(menu: Menu, price: Prices, solved: _Solved) -> tuple[Share, ...]:
    """What every unit got."""
    return tuple(
        Share(
            unit,
            sum(menu.layout.by_name[name].parameters for name in unit),
            option,
            sizes,
            tuple(lost),
            paid,
            menu.layout.by_name[unit[0]].block in solved.removed,
        )
        for unit, option, sizes, lost, paid in zip(
            menu.units, solved.chosen, menu.sizes, solved.losses, price.costs, strict=True
        )
    )


def _solve(
    menu: Menu,
    price: Prices,
    losses: Sequence[Sequence[float]],
    stream: StreamedModel,
    tokens: Tensor,
    progress: Progress,
) -> _Solved:
    """The exact solution; the losses of removals are measured first where blocks may go."""
    if not menu.drops:
        return _Solved(losses, knapsack(price.costs, losses, price.limit - price.fixed), {})
    without = losses_without(stream, tokens[:PROBE_WINDOWS, :PROBE_LENGTH], progress)
    room = price.limit - price.fixed + sum(price.rests)
    chosen, gone = knapsack_of_blocks(price.costs, losses, blocks_of(menu, price, without), room)
    if len(gone) == menu.layout.blocks:
        raise PlanError(f"within {price.limit:,} {WORDS[price.measure]} no block is worth keeping; raise the budget")
    return _Solved(losses, chosen, {block: without[block] for block in gone})


def _refine(
    solved: _Solved,
    menu: Menu,
    price: Prices,
    stream: StreamedModel,
    database: Database,
    tokens: Tensor,
    search: Search,
    progress: Progress,
) -> _Solved:
    """By trial, among the blocks that stay."""
    stages = [tokens[:count, :PROBE_LENGTH] for count in SEARCH_WINDOWS]
    dense = [choice.dense for choice in menu.choices]
    mixtures = Mixtures(stream, menu.units, dense, database, stages, list(solved.removed))
    gone = [menu.layout.by_name[unit[0]].block in solved.removed for unit in menu.units]
    costs = [(0,) if absent else paid for absent, paid in zip(gone, price.costs, strict=True)]
    room = price.limit - price.fixed + sum(price.rests[block] for block in solved.removed)

    def report(generation: int, loss: float) -> None:
        progress("search", generation + 1, search.generations, f"KL {loss:.4f}")

    best, before, after = evopress(solved.chosen, costs, room, mixtures.losses, search, report)
    return replace(solved, chosen=best, refined=(before, after))
