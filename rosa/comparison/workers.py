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
    """A pool of so many processes, which share out the GPUs that this one sees, one each."""
    context = multiprocessing.get_context("spawn")
    gpus = context.SimpleQueue()
    visible = _visible_gpus()
    for number in range(jobs):
        gpus.put(visible[number % len(visible)] if visible else None)
    return ProcessPoolExecutor(jobs, mp_context=context, initializer=_settle, initargs=(gpus, jobs))


def _visible_gpus() -> list[str]:
    """The GPUs that this process sees, as CUDA_VISIBLE_DEVICES names them."""
    count = torch.cuda.device_count()
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",")[:count] if named else [str(number) for number in range(count)]


def submit(pool: ProcessPoolExecutor, function: Callable, calls: Sequence[tuple]) -> list[Future]:
    """Hands the pool calls of a function, by their arguments. Ctrl-C, which the terminal sends to the workers too, is
    left to this process."""
    with _interrupts_ignored():  # as the processes that start now inherit it
        return [pool.submit(function, *arguments) for arguments in calls]


def kill(pool: ProcessPoolExecutor) -> None:
    """Ends the pool's processes at once."""
    for process in list(pool._processes.values()):
        process.kill()


def _settle(gpus: SimpleQueue, jobs: int) -> None:
    """Gives a process its GPU, the only one that it sees, or its share of the processor's threads."""
    threading.Thread(target=_die_with_parent, daemon=True).start()
    tqdm.set_lock(threading.RLock())  # its own is a semaphore that a killed worker leaves behind
    gpu = gpus.get()
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu  # before CUDA is asked for anything in this process
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
