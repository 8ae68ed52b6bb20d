"""Slow, obvious versions of the methods in fp64: no blocks, no Cholesky factor, no code shared with the package."""

import torch

DIVISORS = {
    "full": lambda bits: (2**bits - 1) / 2,
    "narrow": lambda bits: 2 ** (bits - 1) - 1,
    "wide": lambda bits: 2 ** (bits - 1),
}


def correlated(tokens, columns, *, seed=0, mix=0.15):
    """Inputs (T, K) whose columns are correlated and of unequal size, fp32."""
    generator = torch.Generator().manual_seed(seed)
    plain = torch.randn(tokens, columns, generator=generator)
    blend = torch.eye(columns) + mix * torch.randn(columns, columns, generator=generator)
    inputs = plain @ blend
    inputs[:, 1] *= 10
    return inputs


def random_weight(rows, columns, *, seed=1):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.05


def fit(values, grid):
    """Scale and zero point, as fp64 scalars, of a one-dimensional group."""
    values = values.double()
    low, high = -(2 ** (grid.bits - 1)), 2 ** (grid.bits - 1) - 1
    if grid.symmetric and grid.scale_rule == "signed-max":
        largest = max(values.tolist(), key=abs)
        scale = largest / low
    elif grid.symmetric:
        scale = float(values.abs().max()) / DIVISORS[grid.scale_rule](grid.bits)
    else:
        bottom, top = min(float(values.min()), 0.0), max(float(values.max()), 0.0)
        scale = (top - bottom) / (2**grid.bits - 1)
    scale = float(torch.tensor(scale, dtype=torch.float32).to(grid.scale_dtype)) or 1.0
    zero = 0 if grid.symmetric else min(max(low - round(bottom / scale), low), high)
    return scale, zero


def nearest(value, scale, zero, grid):
    """Code of one number."""
    low, high = -(2 ** (grid.bits - 1)), 2 ** (grid.bits - 1) - 1
    return min(max(round(value / scale) + zero, low), high)


def groups_of(columns, grid):
    width = grid.group_size if isinstance(grid.group_size, int) else columns
    return [range(first, min(first + width, columns)) for first in range(0, columns, width)]


def rtn(weight, grid):
    """Values after rounding to nearest, number by number."""
    result = torch.zeros(weight.shape, dtype=torch.float64)
    for row in range(weight.shape[0]):
        for group in groups_of(weight.shape[1], grid):
            members = weight if grid.group_size == "tensor" else weight[row, group.start : group.stop]
            scale, zero = fit(members.flatten(), grid)
            for column in group:
                result[row, column] = scale * (nearest(float(weight[row, column]), scale, zero, grid) - zero)
    return result


def assert_same_rounding(result, expected, weight):
    """Equal up to ties: under the rule `full` the largest weight of a group lies exactly between two codes."""
    torch.testing.assert_close(
        (result.double() - weight.double()).abs(), (expected - weight.double()).abs(), rtol=1e-4, atol=1e-6
    )
    assert ((result.double() - expected).abs() > 1e-6).double().mean() <= 0.2


def damped(gram, damping):
    """The Hessian in fp64, dead columns decoupled."""
    hessian = gram.double().clone()
    dead = hessian.diagonal() == 0
    mean = hessian.diagonal()[~dead].mean()
    hessian.diagonal().add_(dead * mean)
    return hessian + damping * mean * torch.eye(len(gram), dtype=torch.float64)


def loss(weight, result, hessian):
    """tr((W - Q) H (W - Q)^T)."""
    change = weight.double() - result.double()
    return float(((change @ hessian.double()) * change).sum())


def eliminate(weight, hessian, fix):
    """Optimal brain surgeon, column by column: `fix(column, current)` gives the values (N,) a column is fixed at.

    The inverse of the Hessian of the columns still free is kept by Gaussian elimination. Returns the fixed weights
    and the loss found on the way.
    """
    current, inverse = weight.double().clone(), torch.linalg.inv(hessian)
    total = 0.0
    for column in range(weight.shape[1]):
        pivot = inverse[column, column].clone()
        fixed = fix(column, current, inverse)
        change = (current[:, column] - fixed) / pivot
        total += float((change.square() * pivot).sum())
        current -= change.unsqueeze(1) * inverse[column]
        current[:, column] = fixed
        inverse = inverse - torch.outer(inverse[:, column], inverse[column]) / pivot
    return current, total


def gptq(weight, hessian, grid, order=None, *, static=False, kept=None):
    """GPTQ with groups of consecutive columns in the visiting `order`, or static groups of original columns."""
    rows, columns = weight.shape
    order = list(range(columns)) if order is None else list(order)
    kept = torch.ones_like(weight, dtype=torch.bool) if kept is None else kept
    groups = groups_of(columns, grid)
    moved, hessian, alive = weight[:, order], hessian[order][:, order], kept[:, order]
    found = {}
    if static:
        for row in range(rows):
            for group in groups:
                members = (weight * kept)[row, group.start : group.stop]
                for column in group:
                    found[row, order.index(column)] = fit(members, grid)

    def fix(position, current, inverse):
        if not static:
            for group in groups:
                if position == group.start:
                    for row in range(rows):
                        members = (current * alive)[row, group.start : group.stop]
                        found.update({(row, member): fit(members, grid) for member in group})
        fixed = torch.zeros(rows, dtype=torch.float64)
        for row in range(rows):
            scale, zero = found[row, position]
            value = float(current[row, position]) if alive[row, position] else 0.0
            fixed[row] = scale * (nearest(value, scale, zero, grid) - zero)
        return fixed

    result, total = eliminate(moved, hessian, fix)
    back = torch.empty_like(result)
    back[:, order] = result
    return back, total


def sparsegpt(weight, hessian, *, sparsity=None, zeros_of=None, block=128, rounding=None):
    """SparseGPT; `rounding(row, column, value)` gives a point of a grid fitted beforehand."""
    rows, columns = weight.shape
    kept = torch.ones(rows, columns, dtype=torch.bool)

    def fix(column, current, inverse):
        # Scores need the pivots of columns not yet reached: eliminate ahead on a copy.
        if zeros_of and column % zeros_of[1] == 0:
            span = range(column, column + zeros_of[1])
        elif not zeros_of and column % block == 0:
            span = range(column, min(column + block, columns))
        else:
            span = ()
        pivots, ahead = {}, inverse.clone()
        for j in span:
            pivots[j] = float(ahead[j, j])
            ahead = ahead - torch.outer(ahead[:, j], ahead[j]) / ahead[j, j]
        scored = [(float(current[row, j]) ** 2 / pivots[j], row, j) for row in range(rows) for j in span]
        if zeros_of:
            for row in range(rows):
                for _, r, j in sorted(entry for entry in scored if entry[1] == row)[: zeros_of[0] if span else 0]:
                    kept[r, j] = False
        elif span:
            for _, r, j in sorted(scored)[: int(len(scored) * sparsity)]:
                kept[r, j] = False
        fixed = current[:, column] * kept[:, column]
        if rounding:
            fixed = torch.tensor([rounding(row, column, float(fixed[row])) for row in range(rows)], dtype=torch.float64)
        return fixed

    result, total = eliminate(weight, hessian, fix)
    return result, kept, total


def drawn_from(probabilities, generator):
    """An index (B, 1) per row of (B, V): the number of running sums that a number drawn at random reaches."""
    sums = probabilities.cumsum(1, dtype=torch.float64)
    at = torch.rand(len(sums), 1, dtype=torch.float64, generator=generator) * sums[:, -1:]
    return (sums <= at).sum(1, keepdim=True)
