"""Runs of a benchmark in several processes, of which the later ones may follow from the rows of the earlier ones."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from typing import Any

Name = tuple[str, ...]


def run_all(
    pool: ProcessPoolExecutor,
    workers: int,
    jobs: Callable[[], Iterator[tuple[Name, Callable[..., Any], tuple[Any, ...]]]],
    ended: Callable[[Name, Any], None],
) -> bool:
    """Run all jobs, `workers` at once; returns whether none failed.

    jobs() gives the name, function and arguments of those that have no result yet, and is asked again after each end.
    ended(name, result) is called for each; the result of one that failed is None.
    """
    running: dict[Future[Any], Name] = {}
    failed: set[Name] = set()
    while True:
        taken = {*failed, *running.values()}
        waiting = (job for job in jobs() if job[0] not in taken)
        while len(running) < workers and (job := next(waiting, None)):
            name, function, arguments = job
            running[pool.submit(function, *arguments)] = name
        if not running:
            return not failed
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            name, found = running.pop(future), None
            try:
                found = future.result()
            except Exception as error:  # one run that fails is no reason to lose the others
                failed.add(name)
                print(f"{' '.join(name)}: left out: {error}", file=sys.stderr, flush=True)
            ended(name, found)
