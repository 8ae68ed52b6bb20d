"""Independent pieces of tensor work side by side, each on its own share of the threads."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Task = TypeVar("Task")
Result = TypeVar("Result")


def side_by_side(
    function: Callable[[Task], Result], tasks: Sequence[Task], cost: Callable[[Task], float] = lambda task: 0
) -> list[tuple[Result, list[str]]]:
    """`function` of every task, in order, with the warnings each gave.

    cost  how long each will take, in any unit; the longest begin first, so that none is left alone at the end

    A column sweep is thousands of small operations: two sweeps on one thread each take half the time of two sweeps
    one after the other on two threads, and do not stall when another process needs a core. The results do not
    depend on how tasks are spread.
    """
    if not tasks:
        return []
    threads = torch.get_num_threads()
    workers = min(len(tasks), threads)
    said: dict[int, list[str]] = {}

    def run(task: Task) -> tuple[Result, list[str]]:
        heard = said[threading.get_ident()] = []
        return function(task), heard

    def hear(message: Warning | str, *_: object, **__: object) -> None:
        said.get(threading.get_ident(), []).append(str(message))

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = hear
        torch.set_num_threads(threads // workers)
        try:
            order = sorted(range(len(tasks)), key=lambda number: -cost(tasks[number]))
            with ThreadPoolExecutor(workers) as pool:
                done = {number: pool.submit(run, tasks[number]) for number in order}
                return [done[number].result() for number in range(len(tasks))]
        finally:
            torch.set_num_threads(threads)
