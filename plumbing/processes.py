"""One process or many: rank, device, signals, and decisions that all ranks take alike.

In       the environment variables that torchrun sets, or none
Out      Processes: .rank .world .main .device .stop, and wrap() for models
How      nccl between GPUs, gloo between CPUs; gradients by DistributedDataParallel
"""
import atexit
import contextlib
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import warnings
from datetime import timedelta
from typing import BinaryIO

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from plumbing.flags import UserError, need

try:
    import fcntl
except ModuleNotFoundError:  # Windows
    fcntl = None


def fresh_store(timeout: int) -> dict:
    """Where processes find each other, as arguments of init_process_group: not where they did before torchrun restarted them.

    TRAP: torchrun keeps its store through --max-restarts, and a restarted process would read the dead ones' addresses
    there. On several nodes restarts are counted by each node for itself, so there torch's own way has to do.
    """
    if os.environ.get("LOCAL_WORLD_SIZE") != os.environ.get("WORLD_SIZE"):
        return {}
    store, rank, world = next(dist.rendezvous("env://", timeout=timedelta(seconds=timeout)))
    return {"store": dist.PrefixStore(f"attempt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store), "rank": rank, "world_size": world}


class Processes:
    """This process among those that torchrun started, or alone.

    stop     True once SIGTERM or SIGINT has come: finish the step, save, leave; a second one quits at once
    """

    def __init__(self, device: str = "auto", timeout: int = 600):
        """device   auto, cpu or cuda. Raises UserError when cuda is asked for and absent.

        timeout   seconds to wait for another process; after that this one fails, and torchrun ends them all
        """
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.main, self.stop = self.rank == 0, False
        need(device != "cuda" or torch.cuda.is_available(), "no CUDA device was found; use --device cpu")
        cuda = device != "cpu" and torch.cuda.is_available()
        self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
        if cuda:
            torch.cuda.set_device(self.device)
            torch.set_float32_matmul_precision("high")  # TF32 where autocast leaves float32
        if "RANK" in os.environ and not dist.is_initialized():
            dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(seconds=timeout), **fresh_store(timeout))

    def catch_signals(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)

    def _on_signal(self, number, frame) -> None:
        signal.signal(number, signal.SIG_DFL)
        self.stop = True

    def any(self, *flags: bool) -> list[bool]:
        """Each flag, true if it is true on any process."""
        if not dist.is_initialized():
            return list(flags)
        flags = torch.tensor(flags, dtype=torch.int32, device=self.device)
        dist.all_reduce(flags, dist.ReduceOp.MAX)
        return flags.bool().tolist()

    def gather(self, thing) -> list:
        """The `thing` of every process, in order of rank, on every process."""
        things = [thing]
        if dist.is_initialized():
            things = [None] * self.world
            dist.all_gather_object(things, thing)
        return things

    def barrier(self) -> None:
        if dist.is_initialized():
            dist.barrier()

    def end(self) -> None:
        if dist.is_initialized():
            dist.destroy_process_group()

    def wrap(self, model: nn.Module, compile: bool) -> nn.Module:
        """The model as the training loop calls it: compiled if asked, gradients averaged over processes."""
        model = torch.compile(model) if compile else model
        if not dist.is_initialized():
            return model
        # The one buffer that changes, the quantizer's count, is each process's own and summed where it is used.
        # Newer versions of torch warn of another name for this argument, which older ones do not know.
        warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated")
        return DistributedDataParallel(model, broadcast_buffers=False)

    def precision(self, wanted: str) -> str:
        """auto, fp32 or bf16 -> fp32 or bf16: auto is bf16 where the GPU has it."""
        bf16 = wanted == "bf16" or (wanted == "auto" and self.device.type == "cuda" and torch.cuda.is_bf16_supported())
        return "bf16" if bf16 else "fp32"

    def autocast(self, wanted: str):
        """Matrix products in that precision; weights stay float32."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision(wanted) == "bf16")


# ------------------------------------------------------------------------------------------------
# what a program asks of its machine

@contextlib.contextmanager
def enough_memory(repair: str):
    """Running out of memory inside, here or in a data worker, becomes a UserError with the repair."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        # TRAP: DataLoader raises this from a signal handler, so it can come out of any line of the main process.
        if "DataLoader worker" in str(error):
            raise UserError(f"a data worker died ({str(error).splitlines()[0]}); is memory short? lower --workers, and repeat the command to go on") from None
        # A CPU without memory has no exception of its own in torch, only this text.
        if isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError)) or "can't allocate memory" in str(error):
            raise UserError(f"out of memory; {repair}") from error
        raise


def reset_peak_memory(device: torch.device) -> None:
    """From now on peak_memory says what was in use since this call. A Mac cannot forget a peak."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # Linux: the peak becomes what is in use now


def peak_memory(device: torch.device) -> int:
    """The most bytes in use at a time: of a GPU torch's tensors, of a CPU the whole process.

    0 where the system does not say (Windows).
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # TRAP: a child's ru_maxrss starts at what its parent had, so on Linux ask for this process's
    # own high-water mark.
    if os.path.exists("/proc/self/status"):
        with open("/proc/self/status") as file:
            return int(re.search(r"VmHWM:\s*(\d+)", file.read())[1]) * 1024
    if sys.platform != "darwin":
        return 0  # unknown
    import resource
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # in bytes on a Mac


def need_room(folder: str) -> None:
    """Raise UserError unless files can be written into `folder`, which is made if need be: now, not after hours."""
    try:
        os.makedirs(folder, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UserError(f"cannot write into {folder}: {error.strerror}; choose another folder") from error


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
    """Where numbers come from: command, commit ("+changes" when files differ from it), torch, device."""
    def git(*words):
        done = subprocess.run(["git", "-C", os.path.dirname(os.path.dirname(os.path.abspath(__file__))), *words], capture_output=True, text=True) if shutil.which("git") else None
        return done.stdout.strip() if done and done.returncode == 0 else ""
    changed = "+changes" if git("status", "--porcelain", "--untracked-files=no") else ""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    return {"command": command, "commit": (git("rev-parse", "HEAD") or "unknown") + changed, "torch": torch.__version__, "device": name}
