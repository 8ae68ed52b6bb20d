"""Neurons removed by Torch-Pruning: `python peer_torch_pruning.py MODEL TOKENS OUTPUT PARAMETERS CRITERION`.

TOKENS is a safetensors file with `tokens` (S, T). The library's own pruner goes over the MLPs (everything but their
linears is on its list of ignored layers), all to the same width, until at most PARAMETERS are left. CRITERION:
`magnitude` is its GroupMagnitudeImportance, `taylor` its GroupTaylorImportance with gradients of the next-token loss on
TOKENS. What comes out is a plain checkpoint.
"""

import sys
import warnings
from pathlib import Path

import torch
import torch_pruning
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

CRITERIA = {
    "magnitude": torch_pruning.importance.GroupMagnitudeImportance,
    "taylor": torch_pruning.importance.GroupTaylorImportance,
}


def main(source: str, tokens: str, output: str, parameters: str, criterion: str) -> None:
    """Load, take gradients where the criterion wants them, prune, save."""
    warnings.filterwarnings("ignore", message="Unwrapped parameters")
    model = load(source)
    mlps = [layer.mlp for layer in model.model.layers]
    width = width_for(model, int(parameters), len(mlps))
    ratio = 1 - width / model.config.intermediate_size
    linears = {linear for mlp in mlps for linear in (mlp.gate_proj, mlp.up_proj, mlp.down_proj)}
    pruner = torch_pruning.pruner.BasePruner(
        model,
        torch.arange(8)[None],
        CRITERIA[criterion](),
        pruning_ratio_dict={mlp.gate_proj: ratio for mlp in mlps},
        ignored_layers=[each for each in model.modules() if not any(each.children()) and each not in linears],
        output_transform=lambda output: output.logits,
    )
    if criterion == "taylor":
        give_gradients(model, Path(tokens))
    pruner.step()
    widths = {mlp.gate_proj.out_features for mlp in mlps}
    assert widths == {width}, widths
    save(model, source, Path(output), width)


def load(source: str) -> PreTrainedModel:
    """The model in fp32, without a cache, which the tracing of dependencies does not take."""
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    model.config.use_cache = False
    return model


def width_for(model: PreTrainedModel, parameters: int, blocks: int) -> int:
    """Neurons of each of `blocks` blocks that leave at most `parameters` in the model."""
    cost = 3 * model.config.hidden_size * blocks
    excess = sum(each.numel() for each in model.parameters()) - parameters
    return model.config.intermediate_size - -(-excess // cost)


def give_gradients(model: PreTrainedModel, tokens: Path) -> None:
    """Gradients of the MLPs by the mean next-token loss over all windows, into `.grad`; kept beside the windows."""
    weights = {name: each for name, each in model.named_parameters() if ".mlp." in name}
    model.requires_grad_(False)
    file = tokens.with_name("gradients.safetensors")
    if not file.is_file():
        for each in weights.values():
            each.requires_grad_(True)
        windows = load_file(tokens)["tokens"]
        for window in windows:
            (model(input_ids=window[None], labels=window[None]).loss / len(windows)).backward()
        save_file({name: each.grad for name, each in weights.items()}, file)
    for name, gradient in load_file(file).items():
        weights[name].grad = gradient


def save(model: PreTrainedModel, source: str, directory: Path, width: int) -> None:
    """A plain checkpoint, with the tokenizer of the model that it comes from."""
    model.config.intermediate_size = width
    model.config.use_cache = True
    model.save_pretrained(directory)
    for file in Path(source).glob("tokenizer*"):
        (directory / file.name).write_bytes(file.read_bytes())


if __name__ == "__main__":
    main(*sys.argv[1:])
