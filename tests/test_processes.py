"""processes.py: one writer per folder, what a launcher must say, which signals save."""
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import ROOT, free_port, program, ranks, refused
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from plumbing import processes
from plumbing.flags import UserError
from plumbing.processes import Interrupted, Processes, launched
from plumbing.start import main_with_user_errors

# ------------------------------------------------------------------------------------------------
# one writer per folder

def hold(folder: str, pipe) -> None:
    """Take the lock, have a data worker that lives a little longer, and wait for a word."""
    lock = processes.lock_folder(folder)
    worker = os.fork()
    if worker == 0:
        time.sleep(20)
        os._exit(0)
    pipe.send(worker)
    pipe.recv()
    processes.forget_holder(lock)  # as at an exit


@pytest.fixture
def holder(tmp_path):
    """(process that holds the lock of tmp_path, pipe to it), and its worker's number."""
    fork = multiprocessing.get_context("fork")
    ours, theirs = fork.Pipe()
    process = fork.Process(target=hold, args=(str(tmp_path), theirs))
    process.start()
    worker = ours.recv()
    yield process, ours, worker
    os.kill(worker, signal.SIGKILL)
    process.kill()
    process.join()


def lock_is_free(folder) -> bool:
    return not processes.lock_folder(str(folder)).closed


def test_a_second_writer_is_turned_away_with_the_process_number_of_the_first(tmp_path, holder):
    process, pipe, _ = holder
    refused(processes.lock_folder, str(tmp_path / "gone"), names=["cannot write", "gone"])
    told = [str(tmp_path), f"process {process.pid} on", "--run"]
    refused(processes.lock_folder, str(tmp_path), names=told)
    pipe.send("end")
    process.join()
    assert process.exitcode == 0
    # Nothing in the file, or a finished run would not stay as it is.
    assert (tmp_path / ".lock").read_bytes() == b""
    assert lock_is_free(tmp_path)


def test_a_killed_process_leaves_no_lock_behind_even_while_its_workers_live(tmp_path, holder):
    process, _, worker = holder
    process.kill()
    process.join()
    os.kill(worker, 0)  # lives
    assert lock_is_free(tmp_path)


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
    """In a process of its own: what others have left behind here would be used again."""
    done = program("-c", PEAKS)
    assert done.returncode == 0, done.stderr


PEAKS = """
import torch
from plumbing.processes import peak_memory, reset_peak_memory
cpu, million = torch.device("cpu"), 2 ** 20
torch.ones(300 * million, dtype=torch.uint8)
before = peak_memory(cpu)
reset_peak_memory(cpu)
assert peak_memory(cpu) < before - 200 * million
start = peak_memory(cpu)
torch.ones(100 * million, dtype=torch.uint8)
assert 90 * million < peak_memory(cpu) - start < 150 * million
"""


# ------------------------------------------------------------------------------------------------
# what a launcher says

@pytest.fixture
def launcher(monkeypatch):
    """launcher("RANK=0 WORLD_SIZE=2") sets these variables of a launcher, and no others."""
    def put(text: str) -> None:
        for name in (*processes.LAUNCHER, "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
            monkeypatch.delenv(name, raising=False)
        for word in text.split():
            monkeypatch.setenv(*word.split("="))
    return put


WHOLE = "RANK=1 WORLD_SIZE=4 MASTER_ADDR=127.0.0.1 MASTER_PORT=29500"


def test_one_process_without_a_launcher_and_its_word_with_one(launcher):
    for text in ("", "MASTER_ADDR=node1 MASTER_PORT=29500", "WORLD_SIZE= RANK="):
        launcher(text)
        assert launched() == (0, 1)
    launcher(WHOLE)
    assert launched() == (1, 4)


@pytest.mark.parametrize("left", ["WORLD_SIZE=4", "WORLD_SIZE=1", "RANK=0", "RANK=0 WORLD_SIZE=1",
                                  "RANK=1 WORLD_SIZE=2 MASTER_ADDR=127.0.0.1",
                                  "WORLD_SIZE=4 MASTER_ADDR=node1 MASTER_PORT=29500"])
def test_a_part_of_what_a_launcher_sets_is_refused_and_named(launcher, left):
    launcher(left)
    missing = [name for name in processes.LAUNCHER if name not in left]
    repair = "unset " + " ".join(word.split("=")[0] for word in left.split()
                                 if word.split("=")[0] in processes.LAUNCHER)
    message = refused(Processes, "cpu", names=[*left.split(), *missing, "torchrun"])
    assert sorted(repair.split()) == sorted(message.rpartition("after: ")[2].split())


@pytest.mark.parametrize("before, after", [("RANK=1", "RANK=4"), ("RANK=1", "RANK=-1"),
                                           ("RANK=1", "RANK=x"), ("WORLD_SIZE=4", "WORLD_SIZE=1.5"),
                                           ("WORLD_SIZE=4", "WORLD_SIZE=0"),
                                           ("MASTER_PORT=29500", "MASTER_PORT=tcp://10.0.0.1")])
def test_what_is_no_number_or_out_of_range_is_refused_and_named(launcher, before, after):
    launcher(WHOLE.replace(before, after))
    refused(launched, names=[after, "unset"])


def test_missing_processes_are_waited_for_in_words_and_not_for_ever(launcher, monkeypatch, capfd):
    port = free_port()
    monkeypatch.setattr(processes, "PATIENCE", 0.2)
    launcher(f"RANK=0 WORLD_SIZE=2 MASTER_ADDR=127.0.0.1 MASTER_PORT={port}")
    began, place = time.time(), f"127.0.0.1:{port}"
    refused(Processes, "cpu", 1, names=["2 processes", place, "torchrun"])
    assert time.time() - began < 30
    assert f"waiting for all of 2 processes at {place}, 1 seconds at most" in capfd.readouterr().err


def test_each_process_takes_its_own_gpu_and_says_when_there_is_none(launcher, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    launcher(f"{WHOLE} LOCAL_RANK=1")
    assert processes.local_gpu(4) == torch.device("cuda", 1)
    launcher(f"{WHOLE} LOCAL_RANK=2")
    refused(processes.local_gpu, 4, names=["process 2", "2 can be seen", "--nproc_per_node=2"])
    launcher(WHOLE)  # all four on the first GPU, and no word
    refused(processes.local_gpu, 4, names=["LOCAL_RANK"])


@pytest.mark.parametrize("rank", ["0", "1"])
def test_torchrun_finds_the_line_and_one_process_prints_it(tmp_path, monkeypatch, capsys, rank):
    path = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(path))
    monkeypatch.setenv("RANK", rank)

    def mistaken():
        raise UserError("images are where they are not")
    with pytest.raises(SystemExit) as ended:
        main_with_user_errors(mistaken)
    assert ended.value.code == 2
    line = "error: images are where they are not"
    assert capsys.readouterr().err == (line + "\n" if rank == "0" else "")
    # As torchrun reads it when it looks for the first process that failed.
    failure = ProcessFailure(local_rank=int(rank), pid=1, exitcode=2, error_file=str(path))
    assert failure.message["message"] == line and abs(failure.timestamp - time.time()) < 60


# ------------------------------------------------------------------------------------------------
# signals

ALL_SIGNALS = ["SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1"]


@pytest.fixture
def handlers():
    """What pytest had set for the signals comes back afterwards."""
    before = {name: signal.getsignal(getattr(signal, name)) for name in ALL_SIGNALS}
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # pytest itself may run under nohup
    yield
    for name, handler in before.items():
        signal.signal(getattr(signal, name), handler)


@pytest.mark.parametrize("name", ALL_SIGNALS)
def test_a_signal_asks_to_stop_and_breaks_off_a_wait(handlers, name):
    number, procs = getattr(signal, name), Processes("cpu")
    procs.catch_signals()
    os.kill(os.getpid(), number)
    assert procs.stop
    if name in ("SIGTERM", "SIGINT"):  # a second one is left to the system
        assert signal.getsignal(number) == signal.SIG_DFL
    procs = Processes("cpu")
    procs.catch_signals()
    began = time.time()
    with pytest.raises(Interrupted), procs.interruptible():
        os.kill(os.getpid(), number)
        time.sleep(10)
    with pytest.raises(Interrupted), procs.interruptible():  # it came before the wait
        time.sleep(10)
    assert time.time() - began < 5 and procs.stop


def test_a_closing_terminal_may_say_so_twice_and_nohup_is_obeyed(handlers):
    procs = Processes("cpu")
    procs.catch_signals()
    for _ in range(2):
        os.kill(os.getpid(), signal.SIGHUP)
    assert procs.stop
    assert signal.getsignal(signal.SIGTERM) == procs.on_signal
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    procs.catch_signals()
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


def test_among_several_processes_a_wait_is_not_broken_off(handlers):
    procs = Processes("cpu")
    procs.world = 2  # the other one is in the middle of a step
    procs.catch_signals()
    with procs.interruptible():
        os.kill(os.getpid(), signal.SIGTERM)
    assert procs.stop


def test_where_signals_are_missing_the_others_are_caught(handlers, monkeypatch):
    for name in ("SIGHUP", "SIGUSR1"):  # as on Windows
        monkeypatch.delattr(signal, name)
    procs = Processes("cpu")
    procs.catch_signals()
    os.kill(os.getpid(), signal.SIGINT)
    assert procs.stop
    monkeypatch.undo()


PAGE_FAULTS = """
import resource, sys, torch
from plumbing.processes import keep_memory
if sys.argv[1] == "keep":
    keep_memory()
def work():
    tensors = [torch.ones(1 << 20) for _ in range(8)]  # 4 MiB each
for _ in range(3):
    work()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    work()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.faults
@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_freed_memory_is_used_again_instead_of_being_fetched_anew():
    faults = {}
    for way in ("plain", "keep"):
        done = program("-c", PAGE_FAULTS, way)
        faults[way] = int(done.stdout)
    assert faults["keep"] < 1000 and faults["keep"] <= faults["plain"], faults


# ------------------------------------------------------------------------------------------------
# what processes exchange

EXCHANGE = """
import copy, os
import torch
from torch import nn
from config import Optim
from loop import Loop, new_optimizer
from plumbing.processes import Processes
torch.set_num_threads(1)
procs = Processes("cpu")

class Parts(nn.Module):  # of three layers each process reads another one, and none the third
    def __init__(self):
        super().__init__()
        self.parts = nn.ModuleList(nn.Linear(2, 2) for _ in range(3))
        self.register_buffer("buffer", torch.rand(2))
    def forward(self, x):
        return self.parts[procs.rank](x).square().mean()

torch.manual_seed(procs.rank)  # so the processes begin with other weights
model = Parts()
loop = Loop(model, None, new_optimizer(model, "adamw", 0.1, 0.99),
            Optim(8, 3, 0.1, 0.1, 1, 0.99, 0.1), procs=procs, grad_clip=0.0)
start = copy.deepcopy(model)
x = torch.rand(4, 2)
for step, (part,) in enumerate(loop.over(iter([(x,)] * 3))):
    loop.backward(loop.model(part), {})
    if step == 0:
        first = torch.cat([p.detach().flatten() for p in model.parts[:2].parameters()])
both = procs.gather([model.state_dict(), start.state_dict(), first])
for one, other in zip(*both):
    pairs = [(one, other)] if torch.is_tensor(one) else [(one[k], other[k]) for k in one]
    assert all(torch.equal(a, b) for a, b in pairs), "not the same on both processes"
moved = [not torch.equal(a, b) for a, b in zip(model.parameters(), start.parameters())]
# Weight decay moves the matrix that nothing read; its bias has a gradient of zero.
assert moved == [True] * 5 + [False], moved
"""


def test_processes_start_alike_and_a_layer_that_one_of_them_did_not_read_learns_on_both():
    for done in ranks(2, "-c", EXCHANGE):
        assert done.returncode == 0, done.stderr[-2000:]


# ------------------------------------------------------------------------------------------------
# its end

LEAVES = """
import time
import torch
import torch.distributed as dist
from plumbing.processes import Processes
torch.set_num_threads(1)
procs = Processes("cpu")
for _ in range(3):
    dist.all_reduce(torch.ones(2))
if procs.main:
    time.sleep(0.5)
"""


@pytest.mark.faults  # 16 starts of torch
def test_a_process_that_ends_right_after_an_exchange_is_not_aborted():
    """Python's own end, which a forked child has not, so real processes."""
    for _ in range(8):
        place = dict(os.environ, WORLD_SIZE="2", MASTER_ADDR="127.0.0.1",
                     MASTER_PORT=str(free_port()))
        both = [subprocess.Popen([sys.executable, "-c", LEAVES], cwd=ROOT, stderr=subprocess.PIPE,
                                 env=dict(place, RANK=str(rank)), text=True) for rank in (0, 1)]
        for process in both:
            assert process.wait(120) == 0, process.stderr.read()
