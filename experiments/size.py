"""How large is this program? Lines per folder, settings, files that a training step runs through.

Run      python -m experiments.size
Makes    one Markdown row, for the table in CONTRIBUTING.md
"""
from plumbing.start import main_with_user_errors  # first: catches Ctrl-C from here on

import dataclasses
import inspect
import sys
import tempfile
from pathlib import Path

import config
import d2it.presets
import train
from nativetok import NativeTok

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = (".", "d2it", "plumbing", "evaluation", "experiments", "tests")


def lines(folder: str) -> int:
    """Of all Python files in a folder; of the root without its folders."""
    files = (ROOT / folder).glob("*.py" if folder == "." else "**/*.py")
    return sum(len(path.read_text(encoding="utf-8").splitlines()) for path in files)


def settings() -> int:
    """Fields that a person can set, each counted where it is written down."""
    classes = {cls for module in (config, d2it.presets) for _, cls in inspect.getmembers(module)
               if dataclasses.is_dataclass(cls) and isinstance(cls, type)}
    bases = {base for cls in classes for base in cls.__mro__ if dataclasses.is_dataclass(base)}
    return sum(len(cls.__dict__.get("__annotations__", {})) for cls in bases)


def files_of_a_step() -> set[str]:
    """The project's files whose functions run from one forward of the tokenizer to the next."""
    seen, calls, forward = set(), 0, NativeTok.forward.__code__

    def watch(frame, event, arg):
        nonlocal calls
        if event != "call":
            return
        if frame.f_code is forward and frame.f_locals["self"].training:
            calls += 1
        path = Path(frame.f_code.co_filename)
        if calls == 2 and ROOT in path.parents and ".venv" not in path.parts:
            seen.add(str(path.relative_to(ROOT)))
    with tempfile.TemporaryDirectory() as folder:
        words = ["--preset", "tiny", "--run", folder, "--stage", "1", "--base_steps", "4",
                 "--continuous_steps", "1", "--save_every", "100", "--log_every", "1"]
        args = config.parse_run("", words)
        sys.setprofile(watch)
        try:
            train.main(args)
        finally:
            sys.setprofile(None)
    return seen - {"experiments/size.py"}


def main() -> None:
    files = files_of_a_step()
    counts = [lines(folder) for folder in FOLDERS]
    print(f"\nA step runs through {len(files)} files: {', '.join(sorted(files))}\n")
    print(f"| {' | '.join(('root', *FOLDERS[1:], 'together', 'settings', 'files of a step'))} |")
    print(f"| {' | '.join(map(str, (*counts, sum(counts), settings(), len(files))))} |")


if __name__ == "__main__":
    main_with_user_errors(main)
