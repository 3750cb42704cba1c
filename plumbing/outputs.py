"""Where a program writes: looked at before anything is computed, in one place for all programs.

In       flags and the paths that they name
Out      nothing, or one line that says which place cannot be written, or what lies there
Differs  a file takes the place of its own kind only: what lies at its name, if anything, is called
         or begins like what is going to be written. Nobody wants samples where a photo was
"""
import contextlib
import os
from pathlib import Path

from plumbing.flags import need
from plumbing.images import explained
from plumbing.processes import need_room

# Kinds of files: how the name ends, how the content begins.
JSON, NPZ, PT = (".json", b"{"), (".npz", b"PK"), (".pt", b"PK")
SVG, PNG = (".svg", b"<"), (".png", b"\x89PNG")


def need_places(files: dict[str, tuple[str | None, tuple[str, bytes]]] | None = None,
                folders: dict[str, str | None] | None = None,
                reads: dict[str, str | list[str] | None] | None = None) -> None:
    """Raise UserError unless all of these places can be written: now, not after hours.

    folders  {flag: path}: a folder; it is made
    files    {flag: (path, JSON or another kind)}: a file in a folder that is there
    reads    {flag: path or paths} of what must not be overwritten
    A path of None was not asked for.
    """
    for flag, path in (folders or {}).items():
        if path is not None:
            need(path.strip(), f"{flag} is empty; give the name of a folder")
            need_room(path)
    taken = {}
    for flag, paths in (reads or {}).items():
        for path in [paths] if isinstance(paths, str) else paths or []:
            taken[os.path.realpath(path)] = flag
    for flag, (path, kind) in (files or {}).items():
        if path is None:
            continue
        need_file(flag, path, kind)
        other = taken.setdefault(os.path.realpath(path), flag)
        need(other is flag, f"{flag} and {other} name the same file, {path}, and one would "
             f"overwrite the other; give {flag} another name")


def need_file(flag: str, path: str, kind: tuple[str, bytes]) -> None:
    """Raise UserError unless a file of this kind can be written at `path`."""
    need(path.strip(), f"{flag} is empty; give the name of a file")
    place = Path(path)
    need(not os.path.isdir(path) and not path.endswith(os.sep),
         f"{flag} {path} is a folder; give the name of a file")
    folder = place.parent
    need(os.path.isdir(folder) or not os.path.exists(folder),
         f"cannot write {flag} {path}: {folder} is a file, not a folder; choose another place")
    need(os.path.isdir(folder), f"{flag} {path}: there is no folder {folder}; make it first")
    need_room(str(folder))
    # A name may be too long, for the disk or with the ending of what is being written.
    with (explained(f"cannot write {flag} {path}", "choose another name"),
          contextlib.suppress(FileNotFoundError)):
        os.lstat(place.with_name(f".{place.name}.tmp-{os.getpid()}"))
    if not os.path.exists(path):
        return
    # What is written lies beside its name first, and would take the place of a device.
    need(os.path.isfile(path),
         f"{flag} {path} is a device or a pipe; give the name of a file")
    # These are JSON and zip files too.
    own = place.name in ("config.json", "log.jsonl") or place.suffix == ".pt"
    need(not own, f"{flag} {path} would overwrite a part of the run in {folder}; "
         "give another name")
    with explained(f"cannot write {flag} {path}", "choose another name"), open(place, "rb") as file:
        first = file.read(8).strip()
    ending, begins = kind
    need(place.suffix.lower() == ending or not first or first.startswith(begins),
         f"{flag} {path} is there already, and is no {ending} file, which is what will be written; "
         "move it, or give another name")
