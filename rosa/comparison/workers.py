"""The processes that run cells: each has its GPU, and none outlives the process that started it."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing.connection import wait
from multiprocessing.queues import SimpleQueue
from typing import Any

import torch
from tqdm import tqdm


def workers(jobs: int) -> ProcessPoolExecutor:
    """A pool of so many processes."""
    context = multiprocessing.get_context("spawn")
    numbers = context.SimpleQueue()
    for number in range(jobs):
        numbers.put(number)
    return ProcessPoolExecutor(jobs, mp_context=context, initializer=_settle, initargs=(numbers, jobs))


def submit(pool: ProcessPoolExecutor, function: Callable, calls: Sequence[tuple]) -> list[Future]:
    """Hands the pool calls of a function, by their arguments. Ctrl-C, which the terminal sends to the workers too, is
    left to this process."""
    with _interrupts_ignored():  # as the processes that start now inherit it
        return [pool.submit(function, *arguments) for arguments in calls]


def kill(pool: ProcessPoolExecutor) -> None:
    """Ends the pool's processes at once."""
    for process in list(pool._processes.values()):
        process.kill()


def _settle(numbers: SimpleQueue, jobs: int) -> None:
    """Gives a process its GPU, or its share of the processor's threads."""
    threading.Thread(target=_die_with_parent, daemon=True).start()
    tqdm.set_lock(threading.RLock())  # its own is a semaphore that a killed worker leaves behind
    number = numbers.get()
    if torch.cuda.is_available():
        torch.cuda.set_device(number % torch.cuda.device_count())
    else:
        torch.set_num_threads(max(1, torch.get_num_threads() // jobs))
    sys.stdin.close()


def _die_with_parent() -> None:
    """The parent's end closes a pipe, however it came about."""
    wait([multiprocessing.parent_process().sentinel])
    os._exit(1)


@contextmanager
def _interrupts_ignored() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():  # where handlers cannot be set
        yield
        return
    before: Any = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
