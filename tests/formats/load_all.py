"""Load model directories the way a user does and save their weights and logits. Run as a script, in its own process.

    python load_all.py JOBS OUTPUT [MODULE_TO_IMPORT]

JOBS is a JSON list of directories. For each, OUTPUT gets `<number>.safetensors`, and `report.json` what went wrong.
"""

import contextlib
import importlib
import io
import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file


def main(jobs: str, output: str, *modules: str) -> None:
    torch.set_num_threads(1)
    for name in modules:
        importlib.import_module(name).install()
    from transformers import AutoModelForCausalLM

    reports = []
    for number, directory in enumerate(json.loads(Path(jobs).read_text())):
        try:
            with contextlib.redirect_stderr(io.StringIO()):
                model, info = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
                for module in model.modules():  # bitsandbytes' fused kernel on some processors computes in bf16
                    module.support_avx512bf16_for_cpu = False
                with torch.no_grad():
                    logits = model(torch.arange(3, 43).reshape(2, 20), use_cache=False).logits
            tensors = {name: value.clone() for name, value in model.state_dict().items()}
            save_file({"logits": logits.contiguous(), **tensors}, Path(output) / f"{number}.safetensors")
            reports.append({key: sorted(map(str, value)) for key, value in info.items() if value})
        except Exception as error:
            reports.append({"error": f"{type(error).__name__}: {error}"})
    report = {"reports": reports, "imported": "penjing" in sys.modules}
    (Path(output) / "report.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main(*sys.argv[1:])
