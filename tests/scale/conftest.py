"""Starts real processes, two a time, and sees to it that they end."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {
    "PYTHONPATH": str(ROOT),
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
    # What DeepSpeed compiles belongs to these packages: other environments would compile it anew at every turn, and a
    # build that was killed there would keep all others waiting.
    "TORCH_EXTENSIONS_DIR": str(Path(sys.prefix) / "torch_extensions"),
}
LAUNCHERS = {
    "torchrun": ["-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port={port}"],
    "fsdp2": [
        "-m", "accelerate.commands.launch", f"--config_file={Path(__file__).with_name('fsdp2.yaml')}",
        "--main_process_port={port}",
    ],
}  # fmt: skip


def launch(launcher, script, *arguments, seconds=240):
    """Runs a script, of this folder or by its full path, or a module by its name, on two ranks; returns its exit status
    and its output."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [part.format(port=port) for part in LAUNCHERS[launcher]]
    command += ["-m", script] if script == "rosa" else [str(Path(__file__).parent / script)]
    process = subprocess.Popen(
        [sys.executable, *command, *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        pytest.fail(f"{script} hung:\n{process.communicate()[0][-4000:]}")
    return process.returncode, output


@pytest.fixture(name="launch", scope="session")
def _launch():
    return launch
