"""Neurons removed by LLM-Pruner's code: `peer_llm_pruner.py MODEL TOKENS OUTPUT PARAMETERS CHECKOUT FIRST LAST`.

CHECKOUT is a clone of github.com/horseee/LLM-Pruner (commit 128a07d). Its `TaylorImportance` (first order, element by
element, summed over the group: its defaults) and its `MetaPruner` run as `hf_prune.py --block_wise` calls them: FIRST
blocks and LAST ones stay whole (4 and 1 as published), the others go further, until at most PARAMETERS are left. Two
things are different. The roots are the MLPs alone, as a ratio of a fifth removes none of three groups of heads; and
gradients come from TOKENS (S, T) instead of ten windows of BookCorpus. Widths then differ from block to block, for
which config.json has no place: what is removed is zero in a checkpoint of the full size, which computes the same.
"""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import torch
from peer_torch_pruning import give_gradients, load, save, width_for


def main(source: str, tokens: str, output: str, parameters: str, checkout: str, first: str, last: str) -> None:
    """Load, take gradients, choose, mask, save."""
    package = ModuleType("LLMPruner")  # its own __init__ wants libraries of models that are not pruned here
    package.__path__ = [str(Path(checkout) / "LLMPruner")]
    sys.modules["LLMPruner"] = package
    from LLMPruner import torch_pruning

    model = load(source)
    chosen = list(model.model.layers)[int(first) : -int(last)]
    full, width = model.config.intermediate_size, width_for(model, int(parameters), len(chosen))
    pruner = torch_pruning.pruner.MetaPruner(
        model,
        torch.arange(16).view(2, 8),
        importance=criteria(Path(checkout)).TaylorImportance(group_reduction="sum", taylor="param_first"),
        global_pruning=False,
        iterative_steps=1,
        ch_sparsity=1 - (width + 0.5) / full,
        ignored_layers=[],
        root_module_types=None,
        root_instances=[layer.mlp.gate_proj for layer in chosen],
        output_transform=lambda output: output.logits,
    )
    give_gradients(model, Path(tokens))
    with torch.no_grad():
        for layer, group in zip(chosen, list(pruner.step(interactive=True)), strict=True):
            mlp, gone = layer.mlp, group[0][1]
            assert group[0][0].target.module is mlp.gate_proj and len(gone) == full - width, len(gone)
            mlp.gate_proj.weight[gone] = 0
            mlp.up_proj.weight[gone] = 0
            mlp.down_proj.weight[:, gone] = 0
    save(model, source, Path(output), full)


def criteria(checkout: Path) -> ModuleType:
    """`LLMPruner.pruner.hf_llama_pruner`, without the package around it."""
    path = checkout / "LLMPruner" / "pruner" / "hf_llama_pruner.py"
    spec = importlib.util.spec_from_file_location("hf_llama_pruner", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    main(*sys.argv[1:])
