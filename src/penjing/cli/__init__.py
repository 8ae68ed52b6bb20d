"""The `penjing` command: verbs over `penjing.api`, tables on a terminal, JSON for programs.

Exit codes: 0 done; 1 a bug in Penjing; 2 bad input; 3 the written model failed verification; 4 the result is worse
than the recipe's `require` section allows; 130 interrupted. Standard output carries the result and nothing else;
progress and errors go to standard error. Heavy imports happen inside verbs, so that help is instant.
"""

from __future__ import annotations

from penjing.cli.command import app, main

__all__ = ["app", "main"]
