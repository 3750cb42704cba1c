"""One process or many: rank, device, signals, and decisions that all ranks take alike.

In       the environment variables that a launcher such as torchrun sets, all of them or none
Out      Processes: .rank .world .main .device .stop, and what they exchange: nccl between GPUs,
         gloo between CPUs
Differs  No DistributedDataParallel: after a step's last backward all gradients are summed as one
         tensor. That is as fast here, needs no wrapper around a model, waits for no gradient of a
         parameter that nothing read, and leaves a recorded step (graphs.py) as it is [ours:
         experiments/LOG.md]
"""
import atexit
import contextlib
import ctypes
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import BinaryIO

import torch
import torch.distributed as dist
from torch import Tensor, nn

from plumbing.flags import UserError, need
from plumbing.start import close_bars, stop_signals

try:
    import fcntl
except ModuleNotFoundError:  # Windows
    fcntl = None

INTERRUPTED = 3  # exit code after a signal, when all is saved
PATIENCE = 5  # seconds of silence while others are waited for
SELF = "/proc/self"  # where Linux says what a process uses


class Interrupted(BaseException):
    """A signal asked to stop while this process only waited, so nothing is half done.

    Not an Exception, or whatever explains errors on the way would take it for one.
    """


# ------------------------------------------------------------------------------------------------
# what a launcher says

LAUNCHER = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def launched() -> tuple[int, int]:
    """rank and world as a launcher has set them, all of it or nothing; 0 and 1 without one.

    Raises UserError that names what is missing or wrong: believed, a WORLD_SIZE that was left in
    the shell would have one process train on a part of each batch.
    """
    found = {name: os.environ[name] for name in LAUNCHER if os.environ.get(name)}
    if "RANK" not in found and "WORLD_SIZE" not in found:
        return 0, 1
    missing = [name for name in LAUNCHER if name not in found]
    given = " ".join(f"{name}={value}" for name, value in found.items())
    repair = f"start several processes with torchrun, or one after: unset {' '.join(found)}"
    need(not missing, f"the environment has {given} but no {', '.join(missing)}; {repair}")
    for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"):
        need(found[name].isdecimal(), f"{name}={found[name]} is no whole number; {repair}")
    rank, world = int(found["RANK"]), int(found["WORLD_SIZE"])
    need(rank < world, f"RANK={rank} is not below WORLD_SIZE={world}; {repair}")
    return rank, world


def need_one_process(program: str) -> None:
    """Raise UserError when a launcher has started several: each would do all of it again."""
    need(launched() == (0, 1), f"{program} works in one process, and several would each write the "
         "same files; start it without torchrun")


def local_gpu(world: int) -> torch.device:
    """The GPU of this process: number LOCAL_RANK among those that it sees."""
    visible, local = torch.cuda.device_count(), os.environ.get("LOCAL_RANK", "")
    # Without it all processes of a machine would share its first GPU, and none would say so.
    need(local or world == 1 or visible == 1,
         "the environment has no LOCAL_RANK, which says whose GPU is whose; use torchrun")
    number = int(local) if local.isdecimal() and world > 1 else 0
    need(number < visible, f"process {number} of this machine has no GPU, only {visible} can be "
         f"seen; use --nproc_per_node={visible}, or --device cpu")
    return torch.device("cuda", number)


def fresh_store(timeout: int) -> dict:
    """Where processes find each other, as arguments of init_process_group.

    TRAP: torchrun keeps its store through --max-restarts, and a restarted process would read the
    dead ones' addresses there, hence a place of its own for each attempt. On several nodes each
    node counts its restarts for itself, so there torch's own way has to do.
    """
    if os.environ.get("LOCAL_WORLD_SIZE") != os.environ.get("WORLD_SIZE"):
        return {}
    store, rank, world = next(dist.rendezvous("env://", timeout=timedelta(seconds=timeout)))
    attempt = f"attempt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}"
    return {"store": dist.PrefixStore(attempt, store), "rank": rank, "world_size": world}


def join(device: torch.device, world: int, timeout: int) -> None:
    """Wait for the other processes, `timeout` seconds at most; say so when it takes a while."""
    place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    text = f"waiting for all of {world} processes at {place}, {timeout} seconds at most"
    note = threading.Timer(PATIENCE, print, [text], {"file": sys.stderr, "flush": True})
    note.daemon = True
    if os.environ.get("LOCAL_RANK", "0") == "0":  # one line per machine
        note.start()
    try:
        # nccl is told its GPU: left to guess, it warns at every barrier.
        how = {"backend": "nccl", "device_id": device} if device.type == "cuda" else {
            "backend": "gloo"}
        dist.init_process_group(timeout=timedelta(seconds=timeout), **how, **fresh_store(timeout))
    except (RuntimeError, ValueError) as error:  # torch's DistError is a RuntimeError
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"the {world} processes did not find each other at {place} ({reason}); "
                        "start them with torchrun, all with the same address") from error
    finally:
        note.cancel()
    if device.type == "cpu":
        # TRAP: gloo's threads let go of the last exchange's tensors a moment after its end, which
        # takes Python. If that is closing by then, the process aborts: 9 of 50 that ended right
        # after an exchange, on a busy machine, and none of 50 that waited [ours: measured].
        atexit.register(time.sleep, 0.2)


# ------------------------------------------------------------------------------------------------
# this process among the others

def keep_memory() -> None:
    """Let the C library keep freed memory for the next tensor, where it is glibc.

    Else a tensor of some MB is fetched from the system and given back at every step, and the system
    clears each page of it anew: 3,500 page faults a step of the small presets, 5 to 10% of its time
    [ours: measured]. Values and peak memory stay the same.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):  # other libraries have none
        mallopt, (trim, mmap) = ctypes.CDLL(None).mallopt, (-1, -3)  # M_TRIM_, M_MMAP_THRESHOLD
        mallopt(trim, 1 << 30)
        mallopt(mmap, 1 << 25)  # the most that every glibc takes


class Processes:
    """This process among those that torchrun started, or alone.

    stop     True once a signal has asked to finish the step, save and leave
    """

    def __init__(self, device: str = "auto", timeout: int = 600):
        """device   auto, cpu, cuda or mps. Raises UserError when it is asked for and absent.

        timeout   seconds to wait for another process; then this one fails, and torchrun ends all
        """
        self.rank, self.world = launched()
        self.main, self.stop, self.waiting = self.rank == 0, False, False
        need(device != "cuda" or torch.cuda.is_available(),
             "no CUDA device was found; use --device cpu")
        need(device != "mps" or torch.backends.mps.is_available(),
             "no Apple GPU was found; use --device cpu")
        need(device != "mps" or self.world == 1, "several processes cannot share an Apple GPU; "
             "use one, or --device cpu")
        if device == "mps":
            self.device = torch.device("mps")  # not run: nobody has tried it on a Mac yet
        elif device != "cpu" and torch.cuda.is_available():
            self.device = local_gpu(self.world)
            torch.cuda.set_device(self.device)
            torch.set_float32_matmul_precision("high")  # TF32 where autocast leaves float32
        else:
            self.device = torch.device("cpu")
            keep_memory()
        if os.environ.get("RANK") and not dist.is_initialized():
            join(self.device, self.world, timeout)

    @classmethod
    def alone(cls, device: torch.device) -> "Processes":
        """This process by itself, whatever has launched it: for a loop in another program."""
        self = cls.__new__(cls)
        self.rank, self.world, self.main, self.device = 0, 1, True, device
        self.stop = self.waiting = False
        return self

    def catch_signals(self) -> None:
        """From now on a signal sets .stop; a second SIGTERM or Ctrl-C quits at once.

        SIGHUP comes when a terminal closes, mostly twice, SIGUSR1 from SLURM before time is up.
        """
        for number in stop_signals():
            # nohup has SIGHUP ignored, and that is what it is for.
            if number.name != "SIGHUP" or signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self.on_signal)

    def on_signal(self, number, frame) -> None:
        if number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)
        self.stop = True
        if self.waiting:
            raise Interrupted

    @contextlib.contextmanager
    def interruptible(self):
        """Inside, where a process alone only waits for data, a signal raises Interrupted at once.

        Among several processes it does not: the others are in the middle of a step with this one.
        """
        self.waiting = self.world == 1
        try:
            if self.waiting and self.stop:
                raise Interrupted
            yield
        finally:
            self.waiting = False

    def any(self, *flags: bool) -> list[bool]:
        """Each flag, true if it is true on any process."""
        if self.world == 1:
            return list(flags)
        flags = torch.tensor(flags, dtype=torch.int32, device=self.device)
        dist.all_reduce(flags, dist.ReduceOp.MAX)
        return flags.bool().tolist()

    def mean(self, value: Tensor | float) -> Tensor | float:
        """The mean over processes of a scalar; a float is the same on all of them already."""
        if self.world == 1 or isinstance(value, float):
            return value
        total = value.clone()
        dist.all_reduce(total)
        return total / self.world

    def gather(self, thing) -> list:
        """The `thing` of every process, in order of rank, on every process."""
        things = [thing]
        if self.world > 1:
            things = [None] * self.world
            dist.all_gather_object(things, thing)
        return things

    def barrier(self) -> None:
        if dist.is_initialized():
            dist.barrier()

    def end(self) -> None:
        if dist.is_initialized():
            dist.destroy_process_group()

    def leave(self, text: str) -> None:
        """Say why, and exit as after a signal."""
        if self.main:
            close_bars()
            print(text, flush=True)
        sys.exit(INTERRUPTED)

    def same_start(self, model: nn.Module) -> None:
        """Give every process the parameters and buffers of the first one.

        From there on equal gradients keep parameters equal. Buffers may part: the quantizer's count
        is each process's own, and summed where it is used.
        """
        if self.world > 1:
            for tensor in (*model.parameters(), *model.buffers()):
                dist.broadcast(tensor.detach(), 0)

    def sum_gradients(self, params: Sequence[nn.Parameter]) -> None:
        """Each gradient becomes the sum over processes; all of them go as one tensor."""
        if self.world > 1:
            flat = torch.cat([p.grad.flatten() for p in params])
            dist.all_reduce(flat)
            for p, total in zip(params, flat.split([p.numel() for p in params])):
                p.grad = total.view_as(p).to(p.dtype)

    @property
    def can_record(self) -> bool:
        """Does a step gain from being recorded here, and can it be (graphs.py)?"""
        return self.device.type == "cuda"

    def precision(self, wanted: str) -> str:
        """auto, fp32 or bf16 -> fp32 or bf16: auto is bf16 where the GPU has it."""
        has_it = self.device.type == "cuda" and torch.cuda.is_bf16_supported()
        return "bf16" if wanted == "bf16" or (wanted == "auto" and has_it) else "fp32"

    def autocast(self, wanted: str):
        """Matrix products in that precision; weights stay float32."""
        enabled = self.precision(wanted) == "bf16"
        return torch.autocast(self.device.type, torch.bfloat16, enabled=enabled)


# ------------------------------------------------------------------------------------------------
# what a program asks of its machine

@contextlib.contextmanager
def enough_memory(repair: str):
    """Running out of memory inside becomes a UserError."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        # A CPU without memory has no exception of its own in torch, only this text.
        out = isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError))
        if out or "can't allocate memory" in str(error):
            raise UserError(f"out of memory; {repair}") from error
        raise


def reset_peak_memory(device: torch.device) -> None:
    """From now on peak_memory says what was in use since this call. A Mac cannot forget a peak."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with contextlib.suppress(OSError), open(f"{SELF}/clear_refs", "w") as file:
            file.write("5")  # Linux: the peak becomes what is in use now


def peak_memory(device: torch.device) -> int:
    """The most bytes in use at a time: of a GPU torch's tensors, of a CPU the whole process.

    0 where the system does not say (Windows).
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # TRAP: a child's ru_maxrss starts at what its parent had, so on Linux ask for this process's
    # own high-water mark.
    if os.path.exists(f"{SELF}/status"):
        with open(f"{SELF}/status") as file:
            return int(re.search(r"VmHWM:\s*(\d+)", file.read())[1]) * 1024
    if sys.platform != "darwin":
        return 0  # unknown
    import resource
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # in bytes on a Mac


def need_room(folder: str) -> None:
    """Make `folder`, and raise UserError unless it can be written: now, not after hours."""
    try:
        os.makedirs(folder, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UserError(f"cannot write into {folder}: {error.strerror}; "
                        "choose another folder") from error


def lock_folder(folder: str) -> BinaryIO:
    """Take `folder` for this process alone. The file returned holds the lock: keep it open.

    The kernel gives the lock back when the process ends, however it ends, so none is left behind.
    Raises UserError that names the other process when one writes there already.
    """
    path = os.path.join(folder, ".lock")
    try:
        file = open(path, "a+b")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; choose another folder") from None
    try:
        need(fcntl, "this system has none")
        # TRAP: data workers would inherit a flock(), and they outlive a killed process by seconds.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        file.seek(0)
        holder = file.read(100).decode(errors="replace") or "another process"
        raise UserError(f"{folder} is being written by {holder}; wait for it, or stop it, "
                        "or choose another --run folder") from None
    except (OSError, UserError) as error:
        print(f"note: {folder} has no lock ({error}); let only one process write there",
              file=sys.stderr)
        return file
    file.truncate(0)
    file.write(f"process {os.getpid()} on {platform.node()}".encode())
    file.flush()
    atexit.register(forget_holder, file)
    return file


def forget_holder(file: BinaryIO) -> None:
    """Empty the lock's file, so that a run with nothing left to do leaves its folder as it was."""
    with contextlib.suppress(OSError, ValueError):  # closed already, or a disk that is full
        file.truncate(0)


def provenance(command: str, device: torch.device) -> dict:
    """Where numbers come from: command, commit (+changes, when files differ), torch, device."""
    home = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

    def git(*words):
        if not shutil.which("git"):
            return ""
        done = subprocess.run(["git", "-C", home, *words], capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else ""
    changed = "+changes" if git("status", "--porcelain", "--untracked-files=no") else ""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    elif device.type == "mps":
        name = "Apple GPU"
    else:
        name = f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    return {"command": command, "commit": (git("rev-parse", "HEAD") or "unknown") + changed,
            "torch": torch.__version__, "device": name}
