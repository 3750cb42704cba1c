"""Folders and archives: which images lie there, and how one of them is read. Nothing is written.

In       a folder, a .tar, a .zip, or a .tar.gz .tar.xz .tar.bz2, which is held in memory
Out      list_folder, list_tar, list_zip   a Listing: names, places and sizes of the images
         Source   .read(key) one of them, uint8 (H, W, 3); .peek(key, n) some bytes of its file
Differs  the paper says nothing of files. Names are only compared, never used as paths; what an
         archive is, its first bytes say and not its name; what is passed over is counted
"""
import bz2
import functools
import gzip
import hashlib
import io
import lzma
import math
import os
import re
import sys
import tarfile
import zipfile
from collections import Counter
from dataclasses import dataclass, field
from typing import BinaryIO

import numpy as np

from plumbing.flags import need
from plumbing.images import ENDINGS, MEND_IMAGE, decode, explained

MEND_ARCHIVE = "is it complete? copy it again"
MAX_UNPACKED = 1 << 32  # bytes of a compressed tar in memory, where a bomb is stopped too
MAX_FILE = 1 << 28  # bytes of one image file in an archive
BLOCKS = 8  # pieces of a large file that are looked at, where the whole of it would take too long
# What operating systems and programs leave in any folder, compared in lower case.
NOT_DATA = ("__macosx", "lost+found", "system volume information", "$recycle.bin", "@eadir",
            "__pycache__", "thumbs.db", "desktop.ini")

KINDS = {b"PK\3\4": "zip", b"PK\5\6": "zip", b"\x1f\x8b": "gz", b"\xfd7zXZ\0": "xz", b"BZh": "bz2",
         b"7z\xbc\xaf\x27\x1c": "7z", b"Rar!": "rar", b"\x28\xb5\x2f\xfd": "zstd",
         b"\x93NUMPY": "npy"}
KINDS_BY_ENDING = {".zip": "zip", ".npz": "npz", ".tar": "tar", ".tar.gz": "gz", ".tgz": "gz",
                   ".tar.xz": "xz", ".txz": "xz", ".tar.bz2": "bz2", ".tbz2": "bz2"}
OPENERS = {"gz": gzip.open, "xz": lzma.open, "bz2": bz2.open}


def note(text: str) -> None:
    """One line on stderr, from one of the processes."""
    if os.environ.get("RANK", "0") in ("", "0"):
        print(f"note: {text}", file=sys.stderr)


def digest(*parts: str | bytes) -> str:
    h = hashlib.sha256()
    for part in parts:
        h.update(part if isinstance(part, bytes) else part.encode("utf-8", "surrogateescape"))
    return h.hexdigest()[:32]


# ------------------------------------------------------------------------------------------------
# names and kinds

def split(name: str, separator: str = "/") -> tuple[str, ...]:
    """./a/b.jpg -> a, b.jpg"""
    return tuple(part for part in name.split(separator) if part not in ("", "."))


def separator_of(names) -> str:
    """What stands between folders: a zip from Windows may have only backslashes."""
    names = list(names)
    only_backslashes = any("\\" in name for name in names) and not any("/" in n for n in names)
    return "\\" if only_backslashes else "/"


def hidden(name: str) -> bool:
    """.ipynb_checkpoints, ._x.jpg, a Mac's __MACOSX, lost+found, and whatever lies below"""
    return any(part.startswith(".") or part.lower() in NOT_DATA for part in split(name))


def is_image(name: str) -> bool:
    return name.lower().endswith(ENDINGS)


def kind_of(path: str) -> str:
    """zip, npz, tar, gz or another of KINDS, by the first bytes, or else by the ending; or ""."""
    with explained(path, "make it readable"), open(path, "rb") as file:
        head = file.read(512)
    if head[257:262] == b"ustar":
        return "tar"
    name = path.lower()
    by_name = next((kind for ending, kind in KINDS_BY_ENDING.items() if name.endswith(ending)), "")
    kind = next((kind for start, kind in KINDS.items() if head.startswith(start)), by_name)
    if kind == "zip":  # NumPy's .npz is a zip of .npy files
        try:
            with zipfile.ZipFile(path) as archive:
                names = archive.namelist()
        except Exception:  # torn, and whoever reads it will say so
            return by_name if by_name == "npz" else "zip"
        return "npz" if names and all(name.endswith(".npy") for name in names) else "zip"
    return kind


@dataclass
class Listing:
    """What was found in a folder or an archive."""
    files: dict = field(default_factory=dict)  # of images: name -> (offset, size)
    folders: list = field(default_factory=list)
    shards: list = field(default_factory=list)  # in a folder: names of its .tar files
    texts: dict = field(default_factory=dict)  # in a tar: name of a .cls file -> what it says
    passed: Counter = field(default_factory=Counter)  # other files: ending -> how many

    def pass_over(self, name: str) -> None:
        ending = os.path.splitext(name)[1].lower()
        # What no file system would call an ending (a damaged name, a line break) is not repeated.
        known = re.fullmatch(r"\.[\w+-]{1,12}", ending)
        if ending and not known:
            ending = "with a damaged ending"
        self.passed[ending or "without an ending"] += 1

    def passed_over(self) -> str:
        """"3 files passed over: 2 .heic, 1 .txt", or nothing."""
        if not self.passed:
            return ""
        kinds = [f"{n:,} {ending}" for ending, n in self.passed.most_common(5)]
        kinds += [f"{len(self.passed) - 5} more kinds"] if len(self.passed) > 5 else []
        total = self.passed.total()
        return f"{total:,} file{'s' if total > 1 else ''} passed over: {', '.join(kinds)}"


# ------------------------------------------------------------------------------------------------
# folders

def list_folder(root: str) -> Listing:
    found, todo = Listing(), [""]
    with explained(root, "make it readable"):
        while todo:
            above = todo.pop()
            need(above.count("/") <= 8,
                 f"{root}: {above} lies deeper than 8 folders; does a link lead back up?")
            for entry in os.scandir(os.path.join(root, above)):
                name = above + entry.name
                if hidden(entry.name):
                    continue
                need(not entry.is_symlink() or os.path.exists(entry.path),
                     f"{entry.path}: a link that leads nowhere; mend or remove it")
                if entry.is_dir():
                    found.folders.append(name)
                    todo.append(name + "/")
                elif entry.is_file() and is_image(name):
                    found.files[name] = (0, entry.stat().st_size)
                elif entry.is_file():
                    found.pass_over(name)
                    if name.lower().endswith(".tar"):
                        found.shards.append(name)
    return found


# ------------------------------------------------------------------------------------------------
# tar

def list_tar(source: "Source", path: str) -> Listing:
    found, end = Listing(), 0
    with (explained(path, MEND_ARCHIVE), source.open(path) as file,
          tarfile.open(fileobj=file, mode="r:") as tar):
        while (member := tar.next()) is not None:
            tar.members = []  # or it keeps a kilobyte for every one of a million images
            end = member.offset_data + math.ceil(member.size / 512) * 512
            if hidden(member.name):
                continue
            if member.isdir():
                found.folders.append(member.name)
            elif is_image(member.name):
                need(member.isreg() and not member.issparse(), f"{path}: {member.name} is a link "
                     "or a sparse file; pack it again with tar --dereference --hard-dereference")
                need_small(path, member.name, member.size)
                found.files[member.name] = (member.offset_data, member.size)
            elif member.isreg() and member.name.endswith(".cls") and member.size < 1000:
                text = tar.extractfile(member).read()
                found.texts[member.name] = text.decode("utf-8", "backslashreplace").strip()
            elif member.isreg():
                found.pass_over(member.name)
        # TRAP: tarfile takes a damaged header for the end of the archive; a true end is marked by
        # a block of zeros.
        file.seek(end)
        need(file.read(512) == bytes(512),
             f"{path}: torn after {len(found.files)} images; {MEND_ARCHIVE}")
    return found


def need_small(path: str, name: str, size: int) -> None:
    need(size <= MAX_FILE, f"{path}: {name} has {size:,} bytes, and an image may have "
         f"{MAX_FILE:,}; remove it")


def decompressed(path: str, kind: str) -> bytes:
    """The plain tar inside a compressed one, which alone can be read in any order."""
    with explained(path, MEND_ARCHIVE), OPENERS[kind](path) as packed:
        plain = packed.read(MAX_UNPACKED + 1)
    need(len(plain) <= MAX_UNPACKED, f"{path}: unpacks to more than {MAX_UNPACKED:,} bytes, and "
         "would be held in memory; unpack it yourself, and give the folder or a plain .tar")
    return plain


# ------------------------------------------------------------------------------------------------
# zip

def list_zip(path: str) -> Listing:
    found = Listing()
    zip_handle.cache_clear()  # of an archive that was there before
    with explained(path, MEND_ARCHIVE), zipfile.ZipFile(path) as archive:
        infos = archive.infolist()
    separator = separator_of(info.filename for info in infos)
    for info in infos:
        if hidden(info.filename.replace(separator, "/")):
            continue
        if info.filename.endswith(separator):
            found.folders.append(info.filename)
        elif is_image(info.filename):
            # zipfile reads no more of a member than its size says
            need_small(path, info.filename, info.file_size)
            found.files[info.filename] = (info.header_offset, info.file_size)
        else:
            found.pass_over(info.filename)
    return found


# ------------------------------------------------------------------------------------------------
# one file of many

@dataclass(frozen=True)
class Source:
    """What files are read from. Holds none of them open, so any process may use a copy."""
    kind: str  # folder, tar or zip
    root: str  # its path; of shards that of their folder
    plain: bytes = b""  # what a compressed tar holds

    def read(self, key: np.void) -> np.ndarray:
        """An image, uint8 (H, W, 3). Raises UserError that names it."""
        return decode(self.peek(key), self.names(key)[1])

    def names(self, key: np.void) -> tuple[str, str]:
        """Path of the file that is opened, and what the one inside is called in messages."""
        below = str(key["name" if self.kind == "folder" else "shard"])
        path = os.path.join(self.root, below) if below else self.root
        return path, path if self.kind == "folder" else f"{path}: {key['name']}"

    def peek(self, key: np.void, most: int = sys.maxsize) -> bytes:
        """Its bytes, or of more than `most` some pieces."""
        path, name = self.names(key)
        with explained(name, MEND_IMAGE):
            if self.kind == "zip":
                # TRAP: processes that share a handle share its position, so each opens its own.
                data = zip_handle(path, os.getpid()).read(str(key["name"]))
                return peeked(io.BytesIO(data), 0, len(data), most)
            with self.open(path) as file:
                if self.kind == "folder":
                    return peeked(file, 0, os.fstat(file.fileno()).st_size, most)
                return peeked(file, int(key["offset"]), int(key["size"]), most)


    def open(self, path: str) -> BinaryIO:
        return io.BytesIO(self.plain) if self.plain else open(path, "rb", buffering=0)


@functools.lru_cache(maxsize=8)
def zip_handle(path: str, pid: int) -> zipfile.ZipFile:
    return zipfile.ZipFile(path)


def peeked(file: BinaryIO, start: int, size: int, most: int) -> bytes:
    """Of the `size` bytes from `start` on all, if these are at most `most`.

    Of more, BLOCKS pieces with `most` bytes together: the first, the last and others between, as
    far from each other as they can be.
    """
    pieces, length = (1, size) if size <= most else (BLOCKS, most // BLOCKS)
    found = []
    for k in range(pieces):
        file.seek(start + k * (size - length) // max(1, pieces - 1))
        found.append(file.read(length))
    return b"".join(found)
