"""Models by their name on the Hugging Face hub."""

from __future__ import annotations

import re
from pathlib import Path

from penjing.errors import CheckpointError

HUB_ID = re.compile(r"(?P<repo>\w[\w.-]*/\w[\w.-]*)(@(?P<revision>[\w./-]+))?")
PATTERNS = ("*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "*.safetensors")


def download(source: str, *, with_code: bool = False) -> Path:
    """Fetch `org/name[@revision]` (or take it from the local cache) and return its directory.

    Only safetensors and text are fetched, never pickles; Python files when `with_code`. Raises CheckpointError.
    """
    match = HUB_ID.fullmatch(source)
    if match is None:
        raise CheckpointError(f"{source}: not of the form org/name or org/name@revision")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    patterns = [*PATTERNS, *(["*.py"] if with_code else [])]
    try:
        return Path(snapshot_download(match["repo"], revision=match["revision"], allow_patterns=patterns))
    except GatedRepoError as error:
        raise CheckpointError(
            f"{source}: access must be asked for on the hub, then log in with `hf auth login`"
        ) from error
    except RevisionNotFoundError as error:
        raise CheckpointError(f"{source}: the hub has no such revision") from error
    except RepositoryNotFoundError as error:
        raise CheckpointError(
            f"{source}: no such directory here and no such model on the hub (or it is private)"
        ) from error
    except Exception as error:  # offline mode, time-outs and proxies each have an exception of their own
        raise CheckpointError(
            f"{source}: no such directory here, not in the hub's cache, and the hub cannot be reached; "
            "go online, or copy the model's directory here and give its path"
        ) from error
