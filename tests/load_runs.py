"""Run Penjing's own load probe on many directories in one fresh process, which is a stranger's: this is a script.

python load_runs.py PROBE_SCRIPT OUTPUT DIRECTORY... [--import MODULE]
"""

import contextlib
import io
import json
import runpy
import sys
from pathlib import Path


def main(script: str, output: str, *directories: str) -> None:
    load = runpy.run_path(script)["main"]
    modules = []
    if "--import" in directories:
        modules = [directories[-1]]
        directories = directories[:-2]
    failures = {}
    for number, directory in enumerate(directories):
        probe = Path(directory) / ".penjing" / "probe.safetensors"
        try:
            with contextlib.redirect_stderr(io.StringIO()):
                load(
                    directory,
                    str(probe),
                    str(Path(output) / f"{number}.safetensors"),
                    "no-code",
                    "next-token",
                    *modules,
                )
        except Exception as error:
            failures[directory] = f"{type(error).__name__}: {error}"
    told = {"failures": failures, "imported": "penjing" in sys.modules}
    (Path(output) / "told.json").write_text(json.dumps(told))


if __name__ == "__main__":
    main(*sys.argv[1:])
