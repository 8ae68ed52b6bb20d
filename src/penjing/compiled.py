"""C++ beside Python: compiled on first use with the compiler of the machine, kept for the next time.

A source file includes nothing but the standard library, so that compiling takes seconds. The library lies in the user's
cache directory under a name made of all that went into it; it is written beside its place and then moved there, so
that processes that build at the same time do not see each other's unfinished files.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
import warnings
from importlib import resources
from pathlib import Path

import torch

_FLAGS = {
    "AVX512": ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma"),
    "AVX2": ("-mavx2", "-mfma", "-mf16c"),
}
"""By what torch says the processor can; elsewhere the compiler's defaults."""

_SECONDS = 300
"""A compiler that takes longer hangs."""


class KernelWarning(UserWarning):
    """A kernel cannot be built on this machine; the message says why and what happens instead."""


class BuildError(Exception):
    """The reason why a kernel cannot be built, in a line."""


@functools.cache
def kernel(source: str) -> ctypes.CDLL | None:
    """The library made from `source`, a file of `penjing.runtime`; None, with one warning per process, without one."""
    try:
        return build(source, torch.backends.cpu.get_cpu_capability())
    except (BuildError, OSError) as error:
        warnings.warn(
            f"no compiled kernel for low-bit weights ({error}): they are decoded when they are loaded, and take the "
            "memory and time of a dense model; install a C++ compiler (apt install g++) or set CXX",
            KernelWarning,
            stacklevel=2,
        )
        return None


def build(source: str, capability: str, package: str = "penjing.runtime") -> ctypes.CDLL:
    """Compile `source`, a file of `package`, for processors with `capability` ("AVX512", "AVX2", others: any), unless
    that was done before.

    Raises BuildError without a working compiler, OSError when no directory can be written or the result not loaded.
    """
    text = (resources.files(package) / source).read_bytes()
    compiler = _compiler()
    flags = ("-O3", "-std=c++17", "-fPIC", *_FLAGS.get(capability, ()))
    made_of = repr((text, compiler, os.stat(compiler).st_mtime_ns, flags, torch.__version__))
    name = f"{Path(source).stem}-{hashlib.sha256(made_of.encode()).hexdigest()[:20]}.so"
    for directory in (cache_directory(), Path(tempfile.gettempdir()) / f"penjing-{os.getpid()}"):
        try:
            directory.mkdir(parents=True, exist_ok=True, mode=0o700)
            if not (directory / name).exists():
                _compile(text, [compiler, *flags], directory / name)
            return ctypes.CDLL(str(directory / name))
        except PermissionError:
            continue
    raise BuildError("no directory can be written")


@functools.cache
def helper(source: str, package: str) -> ctypes.CDLL | None:
    """The library made from `source`, a file of `package`, which does fast what Python can do too; None without one."""
    try:
        return build(source, torch.backends.cpu.get_cpu_capability(), package)
    except (BuildError, OSError):
        return None


def cache_directory() -> Path:
    """Where what takes long to make is kept between runs. It may not exist yet."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "penjing"


def _compiler() -> str:
    named = os.environ.get("CXX")
    for command in (named,) if named else ("c++", "g++", "clang++"):
        if path := shutil.which(command):
            return path
    raise BuildError(f"CXX names {named!r}, which is not there" if named else "no C++ compiler found")


def _compile(text: bytes, command: list[str], target: Path) -> None:
    """With OpenMP when torch's own runtime serves it, so that there is one pool of threads; else without."""
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        source, thing, library = (os.path.join(scratch, name) for name in ("kernel.cpp", "kernel.o", "kernel.so"))
        Path(source).write_bytes(text)
        failed = ""
        for threads in (["-fopenmp"], []):
            # Linked without -fopenmp: the symbols are found in the runtime that torch has loaded.
            failed = _run([*command, *threads, "-c", source, "-o", thing])
            failed = failed or _run([command[0], "-shared", thing, "-o", library])
            if not failed and _loads(library):
                os.replace(library, target)
                return
    raise BuildError(f"{command[0]} failed: {failed or 'its result cannot be loaded'}")


def _run(command: list[str]) -> str:
    """The last line of what a failing command said; empty when it succeeded."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    if done.returncode == 0:
        return ""
    return (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]


def _loads(library: str) -> bool:
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True
