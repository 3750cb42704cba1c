"""Checkpoints that survive kill -9, a full disk, a flipped bit; logs that survive a restart.

In       a dict of plain values and tensors                 save(path, content)
Out      the same dict, from the newest file that is whole  load(path)

    tokenizer.pt            the newest
    tokenizer.prev.pt       the one before, taken when the newest turns out to be damaged
    .tokenizer.pt.tmp-PID   being written; no reader looks at it, sweep() removes leftovers

Differs  from torch.save alone: the temporary is written, put on the disk and renamed over the old
         one. A rename happens or does not, so at every instant at least one whole checkpoint lies
         under one of the two names
Try      python -m plumbing.checkpoint      (flips one bit; torch.load does not notice)
"""
import contextlib
import hashlib
import json
import math
import os
import pickle
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor, nn

from plumbing.flags import UserError, need

FORMAT = 1  # raise it when the content of a checkpoint changes its meaning


# ------------------------------------------------------------------------------------------------
# whole files or none

@contextlib.contextmanager
def replacing(path: str | Path, keep_previous: bool = False) -> Iterator[BinaryIO]:
    """A binary file to write into; it becomes `path` when the block ends well, or else vanishes.

    keep_previous   the file that was at `path` moves to previous(path), it is not overwritten

    Raises UserError when the disk is full or the folder not writable; what was at `path` is then
    still there.
    """
    path = Path(path)
    # same folder: a rename cannot cross disks
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())  # or the rename may reach the disk before the bytes do
        # A damaged newest file is overwritten where it is: it must not push out the good one
        # before it.
        if keep_previous and _is_whole(path):
            os.replace(path, previous(path))
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except (OSError, RuntimeError) as error:
        # torch.save turns a full disk into a puzzling RuntimeError; what really happened is its
        # context.
        cause = error.__context__ if isinstance(error.__context__, OSError) else error
        raise UserError(f"cannot write {path}: {_reason(cause)}; "
                        "is the disk full or the folder not writable? "
                        "What was there before is untouched") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()  # gone already when all went well


def _sync_folder(folder: Path) -> None:
    """Put the renames on the disk too; file systems that cannot do so for a folder are let be."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def sweep(folder: str | Path) -> None:
    """Remove what killed writers left in `folder`: temporaries of processes that no longer run.

    Call it before this process writes anything. A temporary with our own id then comes from an
    earlier process of that id: in a container the id is the same at every start. One writer per
    folder, which processes.lock_folder sees to.
    """
    for temporary in Path(folder).glob(".*.tmp-*"):
        pid = temporary.name.rpartition("-")[2]
        if pid.isdecimal() and (int(pid) == os.getpid() or not _is_alive(int(pid))):
            with contextlib.suppress(OSError):
                temporary.unlink()


def _is_alive(pid: int) -> bool:
    if sys.platform == "win32":
        return False  # TRAP: 0 means Ctrl-C there. A file that is open cannot be removed anyway.
    try:
        os.kill(pid, 0)  # signal 0 only asks whether the process is there
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # there, and somebody else's
        return True
    return True


def _reason(error: Exception) -> str:
    """One line that says what went wrong."""
    if isinstance(error, pickle.UnpicklingError):  # its own text advises to load the file unsafely
        return "its pickle asks for more than plain data, which is never loaded"
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return text.strip().splitlines()[0]


# ------------------------------------------------------------------------------------------------
# save and load

def previous(path: str | Path) -> Path:
    """Where the checkpoint before the newest lies: a/tokenizer.pt -> a/tokenizer.prev.pt."""
    path = Path(path)
    return path.with_name(f"{path.stem}.prev{path.suffix}")


def exists(path: str | Path) -> bool:
    """Is there something to load? A kill between two renames leaves only the previous one."""
    return Path(path).exists() or previous(path).exists()


def save(path: str | Path, content: dict) -> None:
    """Write `content` to `path`; the checkpoint that was there becomes previous(path).

    Raises UserError on a value that is not finite and when writing fails, TypeError on a value that
    load would refuse. In each case the old checkpoints stay as they are.
    """
    content = {key: _plain(value, str(key), path) for key, value in content.items()}
    with replacing(path, keep_previous=True) as file:
        torch.save({**content, "format": FORMAT}, file)


def load(path: str | Path, needs: tuple[str, ...] = ()) -> dict:
    """The content of the newest whole checkpoint at `path`, tensors on the CPU. Runs no code of it.

    needs   keys that the content must have

    A newest file that is missing, torn or altered gives the previous one and a warning on stderr.
    Raises UserError when there is none, none is whole, the format is another or a key is missing.
    """
    path = Path(path)
    need(exists(path),
         f"{path} does not exist; train first, or give the --run folder that holds it")
    problems = []
    for candidate in (path, previous(path)):
        try:
            content = _read(candidate)
            break
        # damage surfaces as nearly any exception, from zipfile, pickle or torch
        except Exception as error:
            problems.append(f"{candidate.name}: {_reason(error)}")
    else:
        raise UserError(f"no checkpoint in {path.parent} can be read ({'; '.join(problems)}); "
                        "restore one from a backup, or delete both to start again")
    found = content.pop("format", None) if isinstance(content, dict) else None
    need(found == FORMAT, f"{candidate} has checkpoint format {found}, this program reads format "
         f"{FORMAT}; use the version of the program that wrote it")
    missing = [key for key in needs if key not in content]
    need(not missing,
         f"{candidate} has no {', '.join(missing)}; is it a checkpoint of another kind?")
    if problems:
        print(f"warning: {problems[0]}; using {candidate.name} instead", file=sys.stderr)
    return content


def _read(path: Path):
    """What torch.load reads from `path`, after every byte of it has been checked."""
    _check_bytes(path)
    return torch.load(path, map_location="cpu", weights_only=True)


def _check_bytes(path: Path) -> None:
    """Raise unless `path` is an archive whose members all have their right checksums."""
    # TRAP: torch.load computes no checksums; a flipped bit simply becomes another weight.
    with zipfile.ZipFile(path) as archive:
        broken = archive.testzip()
        if broken is None:
            # TRAP: attribute 0x10 means "a folder". Flip that one bit and all checksums still hold,
            # but torch.load takes the tensor for empty and returns uninitialised memory.
            folders = [info.filename for info in archive.infolist() if info.external_attr & 0x10]
            broken = folders[0] if folders else None
    if broken is not None:
        raise zipfile.BadZipFile(f"{broken} was altered after it was written")


def _is_whole(path: Path) -> bool:
    try:
        _check_bytes(path)
    except Exception:  # also when there is no such file
        return False
    return True


def _plain(value, name: str, path: str | Path):
    """`value` with every dict made a plain one. `name` leads to it: optimizer.state.0.exp_avg."""
    if isinstance(value, Tensor):
        _need_finite(bool(value.isfinite().all()), name, path)
        return value.detach()
    if isinstance(value, dict):
        return {_plain(k, f"{name} (a key)", path): _plain(v, f"{name}.{k}", path)
                for k, v in value.items()}
    # The exact type, since a NumPy scalar may call itself a float and a namedtuple a tuple.
    if type(value) in (list, tuple):
        return type(value)(_plain(v, f"{name}.{i}", path) for i, v in enumerate(value))
    if type(value) is float:
        _need_finite(math.isfinite(value), name, path)
    elif type(value) not in (str, int, bool, type(None)):
        kind = f"{type(value).__module__}.{type(value).__qualname__}"
        raise TypeError(f"cannot save {path}: {name} is a {kind}; "
                        "make it a str, int, float, bool, None, list, tuple, dict or tensor")
    return value


def _need_finite(finite: bool, name: str, path: str | Path) -> None:
    need(finite, f"refused to save {path}: {name} is not finite (nan or inf); "
                 "resume from the checkpoint before with a lower learning rate or --precision fp32")


# ------------------------------------------------------------------------------------------------
# states: weights, random numbers, settings

def load_strict(module: nn.Module, state: dict, what: str) -> None:
    """Load `state` into `module`, all of it or nothing.

    Raises UserError that names the keys that do not fit.
    """
    own = module.state_dict()
    problems = {
        "missing": [name for name in own if name not in state],
        "unexpected": [name for name in state if name not in own],
        "wrong shape": [f"{name} {tuple(state[name].shape)}, not {tuple(own[name].shape)}"
                        for name in own if name in state and state[name].shape != own[name].shape],
    }
    parts = []
    for kind, names in problems.items():
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        if names:
            parts.append(f"{kind}: {', '.join(names[:3])}{more}")
    need(not parts, f"{what} does not fit this configuration ({'; '.join(parts)}); "
         "use the settings it was trained with")
    # Such a weight is refused when a checkpoint is written, but others write files too, and what is
    # made with it looks like any other id or pixel.
    broken = [name for name in own if not state[name].isfinite().all()]
    need(not broken, f"{what}: {', '.join(broken[:3])} is not finite (nan or inf); "
         "restore a checkpoint from before that happened")
    module.load_state_dict(state, strict=True)


def load_optimizer(optimizer, state: dict, what: str) -> None:
    """Load `state` into `optimizer`, or raise UserError when it belongs to other parameters.

    TRAP: torch loads a state without the moments of a parameter as well, and that parameter then
    starts anew.
    """
    wanted = sum(len(group["params"]) for group in optimizer.param_groups)
    found = len(state.get("state", {}))
    need({"param_groups", "state"} <= state.keys() and found == wanted,
         f"{what} does not fit: it has moments of {found} parameters, not of {wanted}")
    try:
        optimizer.load_state_dict(state)
    except (KeyError, ValueError) as error:
        raise UserError(f"{what} does not fit: {error}") from error


def random_state() -> dict[str, Tensor]:
    """The state of torch's random numbers in this process: of the CPU, and of its GPU if any.

    NumPy's and Python's global generators are left out because the program never draws from them.
    """
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    if torch.backends.mps.is_available():  # not run: nobody has tried it on a Mac yet
        state["mps"] = torch.mps.get_rng_state()
    return state


def set_random_state(state: dict[str, Tensor]) -> None:
    """Go on drawing where random_state() was taken. Without a GPU, a GPU's state is ignored."""
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    if "mps" in state and torch.backends.mps.is_available():
        torch.mps.set_rng_state(state["mps"])


def fingerprint(state: dict[str, Tensor], *extra: dict) -> str:
    """16 hex digits that change with any bit, name, type or shape in `state`, and with `extra`."""
    digest = hashlib.sha256(json.dumps(extra, sort_keys=True).encode())
    for name, tensor in sorted(state.items()):
        digest.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        # As bytes, since NumPy has no bfloat16; flat first, since a scalar cannot be viewed as
        # bytes.
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def check_same(saved: dict, now: dict, what: str,
               repair: str = "use another --run folder, or the old values") -> None:
    """Raises UserError that shows each field in which two dicts differ, as `name: saved -> now`."""
    names = [*saved, *(name for name in now if name not in saved)]
    changed = [f"{name}: {saved.get(name, 'absent')} -> {now.get(name, 'absent')}"
               for name in names
               if name not in saved or name not in now or saved[name] != now[name]]
    need(not changed, f"{what} changed ({', '.join(changed)}); {repair}")


# ------------------------------------------------------------------------------------------------
# JSON beside the checkpoints

def write_json(path: str | Path, obj) -> None:
    """Write `obj` as a JSON file, whole or not at all. Raises UserError when writing fails."""
    with replacing(path) as file:
        file.write((json.dumps(obj, indent=2) + "\n").encode())


def read_json(path: str | Path):
    """The content of a JSON file. Raises UserError when it is not there or damaged."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {_reason(error)}; restore or delete it") from error


def append_jsonl(path: str | Path, row: dict) -> None:
    """Append `row` as one line. A kill can tear the last line at most; trim_jsonl() drops it."""
    try:
        with open(path, "a", encoding="utf-8") as file:  # closing it flushes
            file.write(json.dumps(row) + "\n")
    except OSError as error:
        raise UserError(f"cannot write {path}: {_reason(error)}; "
                        "is the disk full or the folder not writable?") from error


def trim_jsonl(path: str | Path, keep: Callable[[dict], bool]) -> None:
    """Drop the lines of `path` whose row is not to `keep`, and a torn last line, if it exists.

    On resume, rows written after the checkpoint go: their steps are about to be run once more.
    Raises UserError on any other line that is not JSON.
    """
    path = Path(path)
    if not path.exists():
        return
    text = path.read_text(encoding="utf-8", errors="replace")
    lines, kept = text.splitlines(), []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except ValueError:
            need(number == len(lines),
                 f"{path} line {number} is not JSON; delete that line and start again")
            continue
        if keep(row):
            kept.append(line + "\n")
    if "".join(kept) != text:  # a finished run stays as it is, to the byte and the date
        with replacing(path) as file:
            file.write("".join(kept).encode())


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "tokenizer.pt")
        for step in (1, 2):
            save(path, {"step": step, "weights": torch.full((1000,), float(step))})
        print("files       ", *sorted(file.name for file in path.parent.iterdir()))

        data = bytearray(path.read_bytes())
        # halfway lie the weights: one bit in the exponent of one of them
        data[len(data) // 8 * 4 + 3] ^= 1 << 4
        path.write_bytes(data)

        weights = torch.load(path, weights_only=True)["weights"]
        print(f"torch.load   sees nothing wrong: weights from {weights.min():g} to "
              f"{weights.max():g}, all were 2")
        content = load(path)
        print(f"load         falls back to step {content['step']}, weights all "
              f"{content['weights'].unique().item():g}")
