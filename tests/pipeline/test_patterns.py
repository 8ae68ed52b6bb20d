"""Globs for lists of modules: they match what was chosen, nothing that was not, and are few."""

from __future__ import annotations

import fnmatch

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penjing.pipeline.patterns import patterns

NAMES = [
    f"model.layers.{block}.{linear}"
    for block in (0, 1, 10)
    for linear in ("attn.q", "attn.o", "mlp.experts.0.up", "mlp.experts.1.up", "mlp.experts.0.down", "mlp.down")
]


@given(chosen=st.lists(st.sampled_from(NAMES), min_size=1, unique=True))
def test_exactly_the_chosen(chosen: list[str]) -> None:
    others = [name for name in NAMES if name not in chosen] + ["model.embed", "head"]
    found = patterns(chosen, others)
    assert {name for name in NAMES for pattern in found if fnmatch.fnmatchcase(name, pattern)} == set(chosen)
    assert not [name for name in others for pattern in found if fnmatch.fnmatchcase(name, pattern)]
    assert len(found) <= len(chosen)


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [
        (NAMES, ["model.layers.*"]),
        ([name for name in NAMES if name.endswith("attn.q")], ["model.layers.*.attn.q"]),
        ([name for name in NAMES if ".1." in name and "layers.1." in name], ["model.layers.1.*"]),
        (["model.layers.1.attn.o"], ["model.layers.1.attn.o"]),
        ([name for name in NAMES if "layers.10.mlp.experts" in name], ["model.layers.10.mlp.experts.*"]),
    ],
)
def test_few(chosen: list[str], expected: list[str]) -> None:
    others = [name for name in NAMES if name not in chosen] + ["model.embed"]
    assert patterns(chosen, others) == expected


def test_many_names_take_no_time() -> None:
    """A model of 48 blocks with 128 experts, every other block chosen."""
    names = [f"m.layers.{block}.mlp.experts.{expert}.up" for block in range(48) for expert in range(128)]
    chosen = [name for name in names if int(name.split(".")[2]) % 2]
    found = patterns(chosen, [name for name in names if name not in set(chosen)])
    assert len(found) == 24
