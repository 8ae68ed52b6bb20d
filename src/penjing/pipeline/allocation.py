"""Who gets how much under one budget: which choices there are, what they cost, the recipe that comes out.

The outcome is an ordinary recipe whose steps name their targets. Linears that engines merge (q, k, v; gate, up) and the
experts of a block share a choice. Everything that can be refused is refused before a weight is read.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from penjing.checkpoint.base import Checkpoint
from penjing.errors import PlanError
from penjing.methods.allocation.evopress import Search, evopress
from penjing.methods.allocation.knapsack import knapsack
from penjing.models.layout import Layout
from penjing.numerics.precision import compute_dtype
from penjing.pipeline.choices import Choice
from penjing.pipeline.evolution import Database, Mixtures
from penjing.pipeline.menu import Menu
from penjing.pipeline.prices import WORDS, Budget, Prices, prices
from penjing.pipeline.rewritten import RewrittenCheckpoint
from penjing.pipeline.sensitivity import PROBE_LENGTH, Question, Sensitivity, SensitivityWalk
from penjing.pipeline.text import TextSource
from penjing.planning import Plan, make_plan
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
    """

    modules: tuple[str, ...]
    parameters: int
    chosen: int
    bytes: tuple[int, ...]
    losses: tuple[float, ...]
    costs: tuple[int, ...]


@dataclass(frozen=True)
class Allocation:
    """The recipe that spends a budget best, and what led to it.

    recipe   ordinary, ready for `compress`
    plan     what it will do
    prices   the budget and what everything costs in its measure; `cost` is at most `budget`
    by       how losses were estimated: nats per token for `gradient` and `kl`, a ratio for `output`
    refined  measured KL of the knapsack's mixture and of what the search made of it; None without a search
    uniform  bytes of the model with one choice everywhere, by choice
    """

    recipe: Recipe
    plan: Plan
    prices: Prices
    by: Sensitivity
    choices: tuple[Choice, ...]
    shares: tuple[Share, ...]
    uniform: tuple[int, ...]
    refined: tuple[float, float] | None = None

    @property
    def budget(self) -> int:
        """What the whole model may take, in the measure of the prices: bytes, parameters or nanoseconds."""
        return self.prices.limit

    @property
    def cost(self) -> int:
        """What it takes."""
        return self.prices.fixed + sum(share.costs[share.chosen] for share in self.shares)

    @property
    def bits(self) -> float:
        """Bits per weight of the linears that were allocated, with scales and all else that is stored for them."""
        return (
            8 * sum(share.bytes[share.chosen] for share in self.shares) / sum(share.parameters for share in self.shares)
        )

    @property
    def loss(self) -> float:
        """Predicted: the sum of the losses of all units."""
        return sum(share.losses[share.chosen] for share in self.shares)

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
            "choices": names,
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
                    "choice": names[share.chosen],
                    "bytes": share.bytes[share.chosen],
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
    progress: Callable[[str, int, int, str], None],
    trust_remote_code: bool = False,
) -> Allocation:
    """Measure, solve, refine if the search has generations, and write the recipe.

    Raises PlanError before anything is measured when no answer is possible.
    """
    menu = Menu.open(checkpoint, layout, recipe, choices)
    price = prices(menu, budget)
    room = price.limit - price.fixed
    tokens = TextSource(checkpoint).calibration(recipe.calibration).tokens
    rewriting = menu.whole.rewriting
    source = checkpoint if rewriting is None else RewrittenCheckpoint(checkpoint, rewriting, "allocate")
    refinement = None
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
        losses = walk.run()
        chosen = knapsack(price.costs, losses, room)
        if search.generations:
            stages = [tokens[:count, :PROBE_LENGTH] for count in SEARCH_WINDOWS]
            mixtures = Mixtures(walk.stream, menu.units, [choice.dense for choice in choices], database, stages)

            def report(generation: int, loss: float) -> None:
                progress("search", generation + 1, search.generations, f"KL {loss:.4f}")

            best, *refinement = evopress(chosen, price.costs, room, mixtures.losses, search, report)
            chosen = list(best)
    final = menu.assemble(chosen)
    if final is None:
        raise PlanError(f"every linear fits in {price.limit:,} {WORDS[price.measure]} as it is; there is nothing to do")
    bits_per_weight = 8 * sum(sizes[option] for sizes, option in zip(menu.sizes, chosen, strict=True)) / menu.weights
    final = final.model_copy(update={"summary": f"{bits_per_weight:.3f} bits per weight, allocated by {by} loss"})
    shares = [
        Share(unit, sum(menu.layout.by_name[name].parameters for name in unit), option, sizes, tuple(costs), paid)
        for unit, option, sizes, costs, paid in zip(menu.units, chosen, menu.sizes, losses, price.costs, strict=True)
    ]
    plan = make_plan(checkpoint, layout, final)
    refined = None if refinement is None else (refinement[0], refinement[1])
    return Allocation(final, plan, price, by, tuple(choices), tuple(shares), tuple(menu.totals), refined)
