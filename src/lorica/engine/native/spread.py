"""Rows shared out between threads: C code holds no lock of Python's while it runs.

In: a function of a span of rows, how many numbers they read. Out: all rows done. Refuses to know what is computed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch

LARGE = 2**17
"""Fewer numbers are not worth another thread."""


def spread(part: Callable[[int, int], None], rows: int, numbers: int) -> None:
    """`part(start, stop)` of all rows, in as many spans as torch has threads and there is work for."""
    threads = min(numbers // LARGE, rows)
    threads = min(torch.get_num_threads(), threads) if threads > 1 else 1
    if threads == 1:
        part(0, rows)
        return
    cuts = [rows * i // threads for i in range(threads + 1)]
    list(_pool(threads).map(part, cuts[:-1], cuts[1:]))


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="lorica-native")
