"""A finished run: its tokenizer and generators, out of its folder and ready to draw from; and where a result comes from.

In       the folder that train.py has made
Out      load_tokenizer, load_generator; sample_batch: labels -> uint8 images; provenance, for the head of a result file
"""
import contextlib
import os
import platform
import shutil
import subprocess
import tempfile

import torch
from torch import Tensor

from plumbing import checkpoint
from config import UserError, need
from generator import Generator
from plumbing.images import to_uint8
from nativetok import NativeTok


def load_tokenizer(folder: str, device: torch.device) -> NativeTok:
    """Raises UserError when the run has none."""
    path = os.path.join(folder, "tokenizer.pt")
    need(checkpoint.exists(path), f"{folder} has no tokenizer.pt; train one: python train.py --run {folder}")
    return NativeTok.load(path).to(device)


def load_generator(folder: str, kind: str, tokenizer: NativeTok, device: torch.device) -> Generator:
    """The run's generator of this kind. Raises UserError unless it has learned the ids of this very tokenizer."""
    path, train = os.path.join(folder, f"generator-{kind}.pt"), f"python train.py --run {folder} --stage 3"
    need(checkpoint.exists(path), f"{folder} has no {kind} generator; train it: {train}")
    model = Generator.load(path).to(device)
    # TRAP: ids of another tokenizer run as well, and decode to noise.
    need(model.tokenizer_fingerprint == tokenizer.fingerprint, f"{path} has learned the ids of another tokenizer than the "
         f"tokenizer.pt beside it; delete generator-{kind}*.pt and retrain that generator: {train}")
    return model


def sample_batch(model: Generator, tokenizer: NativeTok, labels: Tensor, options: dict, seed: int, b: int) -> Tensor:
    """labels (B,) of batch b -> uint8 (B, H, W, 3) on the CPU. Its noise is a function of (seed, b) alone."""
    noise = torch.Generator(labels.device).manual_seed(seed * 1_000_003 + b)
    return to_uint8(tokenizer.decode(model.sample(labels, generator=noise, **options))).cpu()


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


def need_room(folder: str) -> None:
    """Raise UserError unless files can be written into `folder`, which is made if need be: now, not after hours."""
    try:
        os.makedirs(folder, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UserError(f"cannot write into {folder}: {error.strerror}; choose another folder") from error


def provenance(command: str, device: torch.device) -> dict:
    """Where numbers come from: command, commit ("+changes" when files differ from it), torch, device."""
    def git(*words):
        done = subprocess.run(["git", "-C", os.path.dirname(os.path.abspath(__file__)), *words], capture_output=True, text=True) if shutil.which("git") else None
        return done.stdout.strip() if done and done.returncode == 0 else ""
    changed = "+changes" if git("status", "--porcelain", "--untracked-files=no") else ""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    return {"command": command, "commit": (git("rev-parse", "HEAD") or "unknown") + changed, "torch": torch.__version__, "device": name}
