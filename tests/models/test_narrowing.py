"""What is coupled in every family, and that a model without units is the model with zeros in their place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from penjing.checkpoint import open_checkpoint
from penjing.errors import PlanError
from penjing.models import layout_of
from penjing.models.couplings import find_couplings
from penjing.models.narrowing import narrow_units, shapes, sliced, stays
from penjing.models.reach import EVERYTHING, Reach, components
from tiny_models import FAMILIES, token_windows

NO_HEAD_WIDTH = ("gpt2", "opt", "gpt_neox")
"""Families whose config derives the width of a head from the number of heads."""

HEADS_IN = {"gpt2": "attn.c_proj", "opt": "self_attn.out_proj", "gpt_neox": "attention.dense"}


def logits(directory: Path) -> Tensor:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float64, experts_implementation="eager").eval()
    with torch.no_grad():
        return model(token_windows(2, 24), use_cache=False).logits


def write(directory: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> Path:
    directory.mkdir(parents=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def random_kept(units: int, count: int, seed: int) -> Tensor:
    return torch.randperm(units, generator=torch.Generator().manual_seed(seed))[:count].sort().values


def masked_and_removed(model: Path, kind: str, count: int, folder: Path) -> tuple[Path, Path]:
    """Two directories: with zeros in the columns of removed units, and without the units."""
    checkpoint = open_checkpoint(model)
    layout = layout_of(checkpoint.config)
    couplings = find_couplings(checkpoint.config, layout)
    units = couplings[0].of(kind)[0].units
    narrow = narrow_units(checkpoint.config, layout, couplings, {(kind, units): count})
    masked = {name: checkpoint.load(name).double() for name in checkpoint.specs()}
    removed = dict(masked)
    for index, block in enumerate(couplings):
        for number, coupling in enumerate(block.of(kind)):
            kept = random_kept(units, count, 10 * index + number)
            for name, rows, columns in stays(coupling, kept):
                module = layout.by_name[f"{layout.block_name(index)}.{name}"]
                mine = {key: removed[f"{module.name}.{key}"] for key in module.tensors}
                removed |= {f"{module.name}.{key}": new for key, new in sliced(module, mine, rows, columns).items()}
                if columns is not None:
                    weight = masked[f"{module.name}.weight"].clone()
                    side = weight if module.transposed else weight.T
                    gone = torch.ones(len(side), dtype=torch.bool).index_fill_(0, columns, False)
                    side[gone] = 0
                    masked[f"{module.name}.weight"] = weight
    assert {name: tuple(tensor.shape) for name, tensor in removed.items() if name in shapes(narrow.layout)} == shapes(
        narrow.layout
    )
    return write(folder / "masked", checkpoint.config, masked), write(folder / "removed", narrow.config, removed)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_neurons_and_groups_of_heads(family: str, tiny_model) -> None:
    checkpoint = open_checkpoint(tiny_model(family))
    layout = layout_of(checkpoint.config)
    for block in find_couplings(checkpoint.config, layout):
        assert not block.unresolved
        (heads,) = block.of("heads")
        assert heads.consumer == HEADS_IN.get(family, "self_attn.o_proj")
        groups = 4 if family in NO_HEAD_WIDTH else 2
        assert heads.columns.shape == (groups, 64 // groups)
        made = sum(rows.shape[1] for rows in heads.rows.values())
        assert made == 64 // groups + 32, "the unit's queries, one key and one value"
        neurons = block.of("neurons")
        width = 32 if family == "qwen3_moe" else 96
        assert len(neurons) == (4 if family in ("mixtral", "qwen3_moe") else 1)
        assert all(coupling.columns.flatten().tolist() == list(range(width)) for coupling in neurons)
        gated = family not in NO_HEAD_WIDTH
        assert all(sum(rows.shape[1] for rows in coupling.rows.values()) == 1 + gated for coupling in neurons)


@pytest.mark.parametrize("kind", ["neurons", "heads"])
@pytest.mark.parametrize("family", FAMILIES)
def test_masked_is_removed(family: str, kind: str, tiny_model, tmp_path) -> None:
    model = tiny_model(family)
    if kind == "heads" and family in NO_HEAD_WIDTH:
        with pytest.raises(PlanError, match=r"\.weight would have shape .* but config.json can only say"):
            masked_and_removed(model, kind, 1, tmp_path)
        return
    count = 1 if kind == "heads" else 19
    masked, removed = masked_and_removed(model, kind, count, tmp_path)
    expected, found = logits(masked), logits(removed)
    assert (expected - logits(model)).abs().max() > 0.05
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_other_classes_take_what_llama_refuses(tiny_model, tmp_path) -> None:
    """64 channels do not divide into three heads, which Llama's config checks for."""
    model = tiny_model("llama", num_attention_heads=8, num_key_value_heads=4, head_dim=16)
    masked, removed = masked_and_removed(model, "heads", 3, tmp_path)
    assert json.loads((removed / "config.json").read_text())["model_type"] == "mistral"
    torch.testing.assert_close(logits(removed), logits(masked), rtol=1e-9, atol=1e-9)
    biased = tiny_model("llama", num_attention_heads=8, num_key_value_heads=4, head_dim=16, attention_bias=True)
    masked, removed = masked_and_removed(biased, "heads", 3, tmp_path / "biased")
    assert json.loads((removed / "config.json").read_text())["model_type"] == "granite"
    torch.testing.assert_close(logits(removed), logits(masked), rtol=1e-9, atol=1e-9)


def test_an_unknown_model_is_discovered(tmp_path) -> None:
    """StableLM has no family file; OLMo 2 has one norm over all queries, so that its heads hang together."""
    from transformers import AutoConfig

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "vocab_size": 64}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = AutoConfig.for_model("stablelm", **sizes, **heads).to_dict()
    layout = layout_of(config)
    (block,) = find_couplings(config, layout)
    assert [(coupling.kind, coupling.units) for coupling in block.found] == [("heads", 2), ("neurons", 48)]
    narrow = narrow_units(config, layout, [block], {("neurons", 48): 40})
    assert narrow.config["intermediate_size"] == 40
    config = AutoConfig.for_model("olmo2", **sizes, **heads).to_dict()
    (block,) = find_couplings(config, layout_of(config))
    assert [coupling.kind for coupling in block.found] == ["neurons"]
    assert "self_attn.q_proj reaches all inputs of self_attn.o_proj" in block.unresolved["self_attn.o_proj"]


def test_components_by_hand() -> None:
    pairs = {"up": torch.tensor([[0, 1], [1, 0], [2, 2]]), "wide": torch.tensor([[0, 0], [0, 1], [1, 2]])}
    columns, rows = components(3, {"up": 3, "wide": 2}, pairs)
    assert columns is None and rows is None, "sets of two and of one"
    pairs = {
        "up": torch.tensor([[0, 1], [1, 0], [2, 2], [3, 3]]),
        "wide": torch.tensor([[0, 0], [0, 1], [1, 2], [1, 3]]),
    }
    columns, rows = components(4, {"up": 4, "wide": 2}, pairs)
    assert columns is not None and rows is not None
    assert columns.tolist() == [[0, 1], [2, 3]]
    assert rows["up"].tolist() == [[0, 1], [2, 3]] and rows["wide"].tolist() == [[0], [1]]
    assert components(2, {"up": 2}, {"up": torch.tensor([[0, 0], [0, 1]])}) == (None, None), "output 1 reaches nothing"


def test_reach_of_everything_is_no_coupling() -> None:
    reach = Reach()
    reach.add("a", 0, torch.tensor([[True, False], [True, True]]))
    assert reach.pairs["a"] is EVERYTHING
    reach.add("b", 2, torch.tensor([[False, True], [False, False]]))
    assert torch.equal(reach.pairs["b"], torch.tensor([[2, 1]]))
