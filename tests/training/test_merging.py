"""Adapters merged for good from the command line, and the reasons why not."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from penjing import cli
from penjing.errors import FormatError, OutputError
from penjing.training.adapters import AdapterOptions, load_base, train_adapter
from penjing.training.merging import merge_adapter
from tiny_models import token_windows

peft = pytest.importorskip("peft")


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "pairs.jsonl"
    rows = [{"prompt": f"Say {word}", "response": f"{word} it is"} for word in ("pine", "pot", "moss", "wire")]
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def test_train_show_merge(text, tiny_model, tmp_path, capsys):
    model, output = tiny_model("llama"), tmp_path / "adapter"
    given = ["--data", text, "--length", 64, "--steps", 3, "--batch", 2, "--rank", 4, "--learning-rate", 0.01]
    words = ["adapter", "train", model, "-o", output, "--kind", "dora", *given, "--json"]
    assert cli.main(list(map(str, words))) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["kind"] == "DoRA" and told["ranks"] == [4] and told["last_loss"] < told["first_loss"]
    assert cli.main(["adapter", "merge", str(model), str(output), "-o", str(tmp_path / "merged"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["linears"] == told["linears"]
    beside = peft.PeftModel.from_pretrained(load_base(model), output).eval()
    with torch.no_grad():
        wanted = beside(token_windows(2, 24), use_cache=False).logits
        found = load_base(tmp_path / "merged")(token_windows(2, 24), use_cache=False).logits
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    with pytest.raises(OutputError, match="not empty"):
        merge_adapter(model, output, tmp_path / "merged")
    assert cli.main(["adapter", "train", str(model), "-o", "x", "--data", text, "--kind", "ia3"]) == 2


def test_codes_are_refused_and_zeros_stay(text, tiny_model, tmp_path):
    from penjing.checkpoint import open_checkpoint
    from penjing.training.models import load_model, save_model

    model = tiny_model("llama")
    options = AdapterOptions(data=text, length=64, steps=1, batch_size=2, rank=4, learning_rate=1e-2)
    train_adapter(model, tmp_path / "adapter", options)
    loaded = load_model(open_checkpoint(model))
    name = "model.layers.0.mlp.up_proj.weight"
    weight = loaded.get_parameter(name)
    weight.data.mul_(weight.abs() > weight.abs().median())
    save_model(loaded, open_checkpoint(model), tmp_path / "pruned", torch.float32)
    merged = merge_adapter(tmp_path / "pruned", tmp_path / "adapter", tmp_path / "merged")
    assert merged.pruned_linears == 1
    after = {
        key: value for file in (tmp_path / "merged").glob("*.safetensors") for key, value in load_file(file).items()
    }
    assert torch.equal(after[name] == 0, weight == 0)
    config = tmp_path / "pruned" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(FormatError, match=r"holds codes \(gptq\).*merge it into the dense model"):
        merge_adapter(tmp_path / "pruned", tmp_path / "adapter", tmp_path / "other")
