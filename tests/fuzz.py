"""Ten thousand damaged files of each kind: a result or a clear error, no crash, hang or code.

Run      python tests/fuzz.py      (part of make test-faults; 2 CPU cores, a few minutes)
         python tests/fuzz.py --kinds npz --count 500 --seed 7
Makes    a table: per kind how many gave a result and how many a UserError. Anything else is printed
         with the seed that makes it again, and the file is kept
Exit     0, or 1 when there was anything else

A good checkpoint, .npz, .tar and image are damaged at random: bits flipped, bytes written over,
pieces cut out, doubled, exchanged or appended, ends cut off. A child process opens them one after
the other under a watch: an audit hook notes whatever would start a program or a connection, an
alarm rings after 10 seconds. A result is compared with nothing; it only has to be one.
"""
import argparse
import contextlib
import io
import os
import signal
import sys
import tempfile
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import numpy as np
import torch
from helpers import encoded, folder_of, packed
from PIL import Image

from plumbing import checkpoint
from plumbing.datasets import open_images
from plumbing.flags import UserError
from plumbing.images import read_image

SECONDS = 10
FORBIDDEN = ("os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "socket.connect",
             "shutil.rmtree", "ctypes.dlopen", "exec")
KINDS = ("checkpoint", "npz", "tar", "image")


def originals(folder: Path) -> dict[str, list[Path]]:
    """A few good files of each kind."""
    model = {"weight": torch.randn(20, 20), "ids": torch.arange(5)}
    checkpoint.save(folder / "small.pt", {"step": 3, "model": model, "names": ["a", "b"],
                                          "random": checkpoint.random_state()})
    x = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), dtype=np.uint8)
    np.savez(folder / "plain.npz", x=x, y=np.arange(6) % 2, classes=np.array(["cat", "dog"]))
    np.savez_compressed(folder / "packed.npz", x=x, y=np.arange(6) % 2)
    tar = packed(folder_of(folder / "images", 4), folder / "four.tar", "")
    photo = Image.fromarray(np.random.default_rng(1).integers(0, 256, (9, 12, 3), dtype=np.uint8))
    kinds = {"image.png": "PNG", "image.jpg": "JPEG", "image.gif": "GIF", "image.webp": "WEBP",
             "image.tif": "TIFF", "image.bmp": "BMP", "image.avif": "AVIF", "image.jp2": "JPEG2000",
             "image.qoi": "QOI", "image.pcx": "PCX", "image.sgi": "SGI", "image.tga": "TGA"}
    for name, kind in kinds.items():
        (folder / name).write_bytes(encoded(photo, kind))
    return {"checkpoint": [folder / "small.pt"],
            "npz": [folder / "plain.npz", folder / "packed.npz"], "tar": [Path(tar)],
            "image": [folder / name for name in kinds]}


def damaged(data: bytes, rng: np.random.Generator) -> bytes:
    """One to four accidents."""
    for _ in range(rng.integers(1, 5)):
        if not data:
            return data
        a, b = sorted(rng.integers(0, len(data) + 1, 2).tolist())
        b = min(b, a + int(2 ** rng.uniform(0, 10)))
        accident = rng.integers(8)
        if accident == 0:
            bit = int(rng.integers(len(data) * 8))
            data = data[:bit // 8] + bytes([data[bit // 8] ^ 1 << bit % 8]) + data[bit // 8 + 1:]
        elif accident == 1:
            data = data[:a] + rng.bytes(b - a) + data[b:]
        elif accident == 2:
            data = data[:a] + bytes([int(rng.choice([0, 255, 127, 128]))]) * (b - a) + data[b:]
        elif accident == 3:
            data = data[:a] + data[b:]
        elif accident == 4:
            data = data[:b] + data[a:b] + data[b:]
        elif accident == 5:
            data = data[:a]
        elif accident == 6:
            c = int(rng.integers(0, len(data) + 1))
            data = data[:a] + data[c:c + b - a] + data[b:]
        else:
            data = data + rng.bytes(int(rng.integers(1, 600)))
    return data


def open_it(kind: str, path: str) -> None:
    if kind == "checkpoint":
        checkpoint.load(path)
    elif kind == "image":
        read_image(path)
    else:
        images = open_images(path)
        for i in range(len(images)):
            images.load(i)


class TooLong(BaseException):
    """The alarm rang. Not an Exception, or what explains errors would take it for the file's."""


def ring(*_):
    raise TooLong(f"no answer within {SECONDS} seconds")


def run(kinds: list[str], count: int, seed: int) -> int:
    """-> number of files that did something else than give a result or a UserError."""
    watching, seen, bad = False, [], 0

    def audit(event, arguments):
        if watching and event in FORBIDDEN and "frozen" not in str(arguments):
            seen.append(event)
    sys.addaudithook(audit)
    signal.signal(signal.SIGALRM, ring)
    with tempfile.TemporaryDirectory() as temporary:
        files = originals(Path(temporary))
        for kind in kinds:  # once unharmed: imports on first use are no accident
            for path in files[kind]:
                open_it(kind, str(path))
        for kind in kinds:
            outcomes = Counter()
            for number in range(count):
                rng = np.random.default_rng((seed, number, len(kind)))
                source = files[kind][number % len(files[kind])]
                path = Path(temporary) / f"damaged{source.suffix}"
                path.write_bytes(damaged(source.read_bytes(), rng))
                seen.clear()
                quiet = io.StringIO()
                with contextlib.redirect_stderr(quiet), contextlib.redirect_stdout(quiet):
                    signal.alarm(SECONDS)
                    watching = True
                    try:
                        open_it(kind, str(path))
                        outcome = "result"
                    except UserError as error:
                        lines = str(error).count("\n") + 1
                        outcome = "UserError" if lines == 1 else f"error of {lines} lines: {error}"
                    except BaseException as error:
                        outcome = f"{type(error).__name__}: {error}"
                    watching = False
                    signal.alarm(0)
                if seen:
                    outcome = f"ran {seen[0]}"
                outcomes[outcome if outcome in ("result", "UserError") else "bad"] += 1
                if outcome not in ("result", "UserError"):
                    bad += 1
                    name = f"fuzz-{kind}-{seed}-{number}{source.suffix}"
                    kept = os.path.join(tempfile.gettempdir(), name)
                    Path(kept).write_bytes(path.read_bytes())
                    print(f"{kind} {number}: {outcome[:300]}  kept as {kept}", flush=True)
            print(f"{kind:12}{count:>7} damaged files: {outcomes['result']} gave a result, "
                  f"{outcomes['UserError']} a clear error, {outcomes['bad']} anything else",
                  flush=True)
    return bad


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--count", type=int, default=10000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    # A crash of the interpreter itself must not pass for success, so the work is done in a child.
    child = os.fork()
    if child == 0:
        os._exit(min(run(args.kinds, args.count, args.seed), 100) and 1)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        sys.exit(f"the reader crashed with signal {os.WTERMSIG(status)}")
    sys.exit(os.WEXITSTATUS(status))
