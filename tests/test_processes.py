"""processes.py: one writer per folder, what a launcher must say, which signals save."""
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from helpers import refused
from plumbing import processes

ROOT = Path(__file__).parent.parent


def start(code: str, *arguments, **environment) -> subprocess.Popen:
    """A Python process that runs `code` beside the project's files and can be talked to."""
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)], text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment})


# ------------------------------------------------------------------------------------------------
# one writer per folder

HOLD = """
import os, sys, time
from plumbing.processes import lock_folder
lock = lock_folder(sys.argv[1])
child = os.fork()  # as a data worker, which inherits every open file and lives a little longer
if child == 0:
    time.sleep(20)
    os._exit(0)
print(child, flush=True)
sys.stdin.readline()
"""


def lock_is_free(folder) -> bool:
    return not processes.lock_folder(str(folder)).closed


def test_a_folder_that_is_not_there_is_one_line(tmp_path):
    refused(processes.lock_folder, str(tmp_path / "gone"), names=["cannot write", "gone"])


def test_a_second_writer_is_turned_away_with_the_process_number_of_the_first(tmp_path):
    holder = start(HOLD, tmp_path)
    child = int(holder.stdout.readline())
    told = [str(tmp_path), f"process {holder.pid} on", "--run"]
    refused(processes.lock_folder, str(tmp_path), names=told)
    holder.stdin.close()
    assert holder.wait() == 0
    os.kill(child, signal.SIGKILL)
    # Nothing in the file, or a finished run would not stay as it is.
    assert (tmp_path / ".lock").read_bytes() == b""
    assert lock_is_free(tmp_path)


def test_a_killed_process_leaves_no_lock_behind_even_while_its_workers_live(tmp_path):
    holder = start(HOLD, tmp_path)
    child = int(holder.stdout.readline())
    holder.kill()
    holder.wait()
    try:
        os.kill(child, 0)  # lives
        assert lock_is_free(tmp_path)
    finally:
        os.kill(child, signal.SIGKILL)


@pytest.mark.parametrize("why", ["no fcntl", "no locks"])
def test_where_there_are_no_locks_it_says_so_and_goes_on(tmp_path, monkeypatch, capsys, why):
    if why == "no fcntl":
        monkeypatch.setattr(processes, "fcntl", None)
    else:
        def lockf(*_):
            raise OSError(37, "No locks available")
        monkeypatch.setattr(processes.fcntl, "lockf", lockf)
    processes.lock_folder(str(tmp_path))
    note = capsys.readouterr().err
    assert note.startswith(f"note: {tmp_path} has no lock (") and note.count("\n") == 1


# ------------------------------------------------------------------------------------------------
# peak memory

@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux forgets a peak")
def test_peak_memory_is_that_since_the_reset_and_counts_what_is_gone_again():
    cpu, million = torch.device("cpu"), 2 ** 20
    torch.ones(300 * million, dtype=torch.uint8)
    before = processes.peak_memory(cpu)
    processes.reset_peak_memory(cpu)
    assert processes.peak_memory(cpu) < before - 200 * million
    start = processes.peak_memory(cpu)
    torch.ones(100 * million, dtype=torch.uint8)
    assert 90 * million < processes.peak_memory(cpu) - start < 150 * million
