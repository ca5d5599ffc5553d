"""Leaving the process groups of several processes."""

from __future__ import annotations

import time

import torch.distributed as dist


def leave_process_groups() -> None:
    """Leaves the process groups that this process has joined, if any: the last thing that a script does once it has
    succeeded. After an error it would wait for ranks that are gone.

    Gloo's threads let go of tensors some time after a collective has ended, for which they need Python's lock. The
    interpreter's shutdown ends a thread that asks for it, and with it the process ("terminate called without an active
    exception", https://github.com/pytorch/pytorch/issues/190489): they are given time before it.
    """
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
        time.sleep(0.25)
