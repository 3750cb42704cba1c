"""The first import of every program: from here on a mistake, and Ctrl-C, end in one line.

In       a program's main(), which raises UserError for what the person at the keyboard can mend
Out      one line on stderr and an exit code: 2 user error, 130 Ctrl-C
Differs  From a plain call at three borders that a long run meets: Ctrl-C while torch is being
         imported, a terminal that knows less than UTF-8, and a reader that goes away (`| head`)
"""
import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

from plumbing.flags import UserError

# libgomp, which divides torch's work between cores, lets a core that waits spin: for good by its
# default, which beside another busy program is ten times slower than one thread. A short spin is
# 1.25 times as fast as one thread on two quiet cores (none at all: 0.7), and no slower on busy ones
# [ours: experiments/LOG.md]. Read as torch is imported.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
ROOT = Path(__file__).resolve().parent.parent


def stop_signals() -> list[signal.Signals]:
    """What asks a program to stop, as far as the system has it: Windows has the first two."""
    return [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1")
            if hasattr(signal, name)]


def quit_at_once(number, frame) -> None:
    os.write(2, b"\ninterrupted before anything was begun\n")
    os._exit(130)  # torch's import would swallow an exception here and there


class Output:
    """stdout or stderr whose reader may go away: then the program goes on, and .gone says so."""

    def __init__(self, stream):
        self.stream, self.gone = stream, False
        if hasattr(stream, "reconfigure"):  # what this terminal cannot spell becomes \\xe9
            stream.reconfigure(errors="backslashreplace")

    def write(self, text: str) -> int:
        self.attempt("write", text)
        return len(text)

    def flush(self) -> None:
        self.attempt("flush")

    def attempt(self, action: str, *what) -> None:
        if self.stream is None or self.gone:  # None: closed before Python started
            return
        try:
            getattr(self.stream, action)(*what)
        except (OSError, ValueError):
            self.gone = True
            # Python flushes the stream once more at its end: let it write into nothing.
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())

    def __getattr__(self, name):
        return getattr(self.stream, name)


def output_gone() -> bool:
    """Has somebody closed the terminal or the pipe that this program prints into?"""
    return any(getattr(stream, "gone", False) for stream in (sys.stdout, sys.stderr))


def tell(line: str) -> None:
    """Print the line on stderr. Under torchrun one process does, and torchrun's page ends with it.

    torchrun prints a page of its own when a process fails. What it finds in the file that it asks
    for stands there as the cause, also when the process is not the one that prints.
    """
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        cause = {"message": line, "extraInfo": {"timestamp": str(int(time.time()))}}
        with contextlib.suppress(OSError), open(path, "w", encoding="utf-8") as file:
            json.dump({"message": cause}, file)
    if not path or os.environ.get("RANK", "0") == "0":
        print(line, file=sys.stderr, flush=True)


def close_bars() -> None:
    """Give each progress bar its last state and the end of its line: what is said next is alone.

    A bar whose loop an error has left would be drawn once more at the end, below the error.
    """
    tqdm = sys.modules.get("tqdm")  # not imported here, as not every program has bars
    for bar in list(tqdm.tqdm._instances) if tqdm else []:
        bar.close()


def main_with_user_errors(main: Callable[[], None]) -> None:
    """Call main(). UserError: its line and exit code 2; Ctrl-C: one line and 130."""
    if signal.getsignal(signal.SIGINT) is quit_at_once:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = Output(sys.stdout), Output(sys.stderr)
    try:
        try:
            main()
        finally:
            close_bars()
    except UserError as error:
        sys.stdout.flush()  # so that the line comes last
        tell(f"error: {error}")
        sys.exit(2)
    except RuntimeError as error:
        # What gloo says of a connection whose other end is gone; that process has said why.
        if not any(text in str(error) for text in ("closed by peer", "reset by peer")):
            raise
        tell("error: another process has ended; its own line says why")
        sys.exit(1)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr, flush=True)
        sys.exit(130)
    finally:
        sys.stdout.flush()
        sys.stdout, sys.stderr = before


def is_a_program_of_ours() -> bool:
    """In a notebook or under pytest, Ctrl-C is somebody else's."""
    path = getattr(sys.modules["__main__"], "__file__", None)
    folders = [ROOT, ROOT / "experiments", ROOT / "d2it", ROOT / "tests"]
    return path is not None and Path(path).resolve().parent in folders


if is_a_program_of_ours() and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, quit_at_once)
