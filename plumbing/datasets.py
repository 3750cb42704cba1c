"""Many images: a folder, an archive, arrays or the built-in shapes behind one interface.

In       a path: a folder with one folder per class, or with images alone; the same as .tar, .zip, .tar.gz, .tgz
         or .tar.xz; an .npz with x uint8 (n, H, W, 3) and perhaps y int (n,) and classes, or with ADM's names
         for samples, arr_0 and arr_1; or "shapes"
Out      ImageSet: .load(i) uint8 (H, W, 3), .labels int64 (n,), .classes, .fingerprint

    open_images ─► ImageSet ─► train_and_val ─► batches.py
         folder, .tar, .zip   from_files   names are listed now, an image is read when it is asked for
         .npz                 from_npz     all of it is held in memory
         shapes               from_shapes  an image is drawn when it is asked for

Differs  the paper trains on ImageNet; any images will do here, and the shapes are ours
"""
import functools
import gzip
import hashlib
import lzma
import math
import operator
import os
import sys
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from plumbing import checkpoint, shapes
from plumbing.flags import UserError, need
from plumbing.images import ENDINGS, MEND_IMAGE, decode, explained, read_image

MEND_ARCHIVE = "is it complete? copy it again"
# No archive of photographs comes near these; a bomb, kilobytes that unpack to terabytes, is stopped at them.
MAX_RATIO, ALWAYS_ALLOWED = 200, 1 << 30  # unpacked bytes: a GiB, and 200 for each packed one
MAX_FILE = 1 << 28  # bytes of one image file in an archive


def digest(*parts: str | bytes) -> str:
    h = hashlib.sha256()
    for part in parts:
        h.update(part if isinstance(part, bytes) else part.encode("utf-8", "surrogateescape"))
    return h.hexdigest()[:32]


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Labelled images behind one interface, wherever they lie. Holds no open file, so any process may use a copy."""
    name: str
    classes: list[str]
    labels: np.ndarray   # int64 (n,)
    fingerprint: str     # hexadecimal; follows from the content, not from where it lies
    # What `read` asks for. Arrays, since workers share them: a list's objects are copied by being looked at.
    keys: np.ndarray     # (n,)
    read: Callable       # key -> uint8 (H, W, 3)

    def __len__(self) -> int:
        return len(self.labels)

    def load(self, i: int) -> np.ndarray:
        """Image i in full size, uint8 (H, W, 3). Raises UserError if it cannot be read."""
        return self.read(self.keys[i])

    def subset(self, indices: np.ndarray) -> "ImageSet":
        fingerprint = digest(self.fingerprint, np.asarray(indices, np.int64).tobytes())
        return ImageSet(self.name, self.classes, self.labels[indices], fingerprint, self.keys[indices], self.read)


def open_images(path: str, cache: str | None = None) -> ImageSet:
    """Open `path` in any form that this file's first lines list; "shapes:val" are the held-out shapes.

    cache   folder for the plain .tar made once of a compressed one; None: beside it
    Raises UserError when it is missing, torn or holds no images.
    """
    if path in ("shapes", "shapes:val"):
        return from_shapes("val" if path.endswith("val") else "train")
    need(os.path.exists(path), f"{path}: no such file or folder; give images as in --help, or shapes")
    ending = path.lower()
    if os.path.isdir(path):
        return from_files(path, *list_folder(path), functools.partial(read_from_folder, path))
    if ending.endswith(".npz"):
        return from_npz(path)
    if ending.endswith(".zip"):
        return from_files(path, *list_zip(path), functools.partial(read_from_zip, path))
    if ending.endswith((".tar", ".tar.gz", ".tgz", ".tar.xz")):
        plain = path if ending.endswith(".tar") else decompressed(path, cache)
        return from_files(path, *list_tar(plain, path), functools.partial(read_from_tar, plain))
    raise UserError(f"{path}: not a folder and none of .tar .tar.gz .tgz .tar.xz .zip .npz; put images into a folder")


def train_and_val(data: str, val_data: str, holdout: int, seed: int, cache: str | None = None) -> tuple[ImageSet, ImageSet]:
    """Training and held-out images: `val_data` if given, or else `holdout` of `data`, at most a tenth, at least one."""
    train = open_images(data, cache)
    if val_data:
        val = open_images(val_data, cache)
        missing, extra = (", ".join(sorted(s)[:5]) or "none" for s in
                          (set(train.classes) - set(val.classes), set(val.classes) - set(train.classes)))
        need(val.classes in (train.classes, ["all"]), f"{val_data}: its classes are not those of {data}, in this order "
             f"(missing: {missing}; extra: {extra}); give both the same class folders")
        return train, val
    if data == "shapes":
        return train, open_images("shapes:val")
    n = len(train)
    if n == 1:
        print(f"note: {data} holds a single image, which is used for training and as held-out image")
        return train, train
    count = max(1, min(holdout, n // 10))
    shuffled = np.random.default_rng(seed).permutation(n)
    return train.subset(np.sort(shuffled[count:])), train.subset(np.sort(shuffled[:count]))


# ------------------------------------------------------------------------------------------------
# folders and archives: a lister finds {name: (offset, size)} and the folders, a reader fetches one image

def split(name: str) -> tuple[str, ...]:
    """./a/b.jpg -> a, b.jpg. Names in archives are only ever compared, never used as paths."""
    return tuple(part for part in name.split("/") if part not in ("", "."))


def hidden(name: str) -> bool:
    """.ipynb_checkpoints, ._x.jpg, a Mac's __MACOSX, and whatever lies below"""
    return any(part.startswith((".", "__MACOSX")) for part in split(name))


def is_image(name: str) -> bool:
    return name.lower().endswith(ENDINGS)


def from_files(path: str, files: dict, folders: list[str], read: Callable) -> ImageSet:
    """Names -> ImageSet. The last two levels are class/image, or the last one is images; what lies above must be shared."""
    need(files, f"{path}: holds no images; their names end in {' '.join(ENDINGS)}")
    parts = {name: split(name) for name in files}
    names = sorted(files, key=parts.get)
    depth = max(len(p) for p in parts.values())
    # such as (cifar, train)
    above = os.path.commonprefix([p[:-1] for p in parts.values()])[:max(0, depth - 2)]
    by_depth = sorted(names, key=lambda name: len(parts[name]))
    need(depth - len(above) <= 2 and len(parts[by_depth[0]]) == depth, f"{path}: images must lie in one folder per class, "
         f"or all in one, but there are {by_depth[0]} and {by_depth[-1]}; give the folder that holds the classes")
    if depth - len(above) == 1:
        classes, labels = ["all"], np.zeros(len(names), np.int64)
    else:
        classes = sorted({p[-2] for p in parts.values()})
        number = {c: k for k, c in enumerate(classes)}
        labels = np.array([number[parts[name][-2]] for name in names], np.int64)
        empty = {p[-1] for p in map(split, folders) if p[:-1] == above} - set(classes)
        need(not empty, f"{path}: no images in class folder {', '.join(sorted(empty)[:5])}; fill or remove it")
    dtype = [("name", f"U{max(map(len, names))}"), ("offset", np.int64), ("size", np.int64)]
    keys = np.array([(name, *files[name]) for name in names], dtype)
    fingerprint = digest(*(f"{'/'.join(parts[name][len(above):])} {files[name][1]}\n" for name in names))
    return ImageSet(os.path.basename(os.path.abspath(path)), classes, labels, fingerprint, keys, read)


def list_folder(root: str) -> tuple[dict, list[str]]:
    files, folders, todo = {}, [], [""]
    with explained(root, "make it readable"):
        while todo:
            above = todo.pop()
            need(above.count("/") <= 8, f"{root}: {above} lies deeper than 8 folders; does a link lead back up?")
            for entry in os.scandir(os.path.join(root, above)):
                name = above + entry.name
                if hidden(entry.name):
                    continue
                need(not entry.is_symlink() or os.path.exists(entry.path),
                     f"{entry.path}: a link that leads nowhere; mend or remove it")
                if entry.is_dir():
                    folders.append(name)
                    todo.append(name + "/")
                elif entry.is_file() and is_image(name):
                    files[name] = (0, entry.stat().st_size)
    return files, folders


def read_from_folder(root: str, key: np.void) -> np.ndarray:
    return read_image(os.path.join(root, key["name"]), MEND_IMAGE)


def list_tar(path: str, shown: str) -> tuple[dict, list[str]]:
    """`shown` is the name for error messages."""
    files, folders, end = {}, [], 0
    with explained(shown, MEND_ARCHIVE), tarfile.open(path, "r:") as tar:
        while (member := tar.next()) is not None:
            tar.members = []  # or it keeps a kilobyte for every one of a million images
            end = member.offset_data + math.ceil(member.size / 512) * 512
            if hidden(member.name):
                continue
            if member.isdir():
                folders.append(member.name)
            elif is_image(member.name):
                need(member.isreg() and not member.issparse(), f"{shown}: {member.name} is a link or a sparse file; "
                     "pack it again with tar --dereference --hard-dereference")
                need(member.size <= MAX_FILE, f"{shown}: {member.name} has {member.size:,} bytes, and an image may have {MAX_FILE:,}; remove it")
                files[member.name] = (member.offset_data, member.size)
        # TRAP: tarfile takes a damaged header for the end of the archive; a true end is marked by a block of zeros.
        with open(path, "rb") as file:
            file.seek(end)
            need(file.read(512) == bytes(512), f"{shown}: torn after {len(files)} images; {MEND_ARCHIVE}")
    return files, folders


def read_from_tar(path: str, key: np.void) -> np.ndarray:
    name = f"{path}: {key['name']}"
    with explained(name, MEND_IMAGE), open(path, "rb") as file:
        file.seek(key["offset"])
        data = file.read(key["size"])
    return decode(data, name)


def list_zip(path: str) -> tuple[dict, list[str]]:
    with explained(path, MEND_ARCHIVE), zipfile.ZipFile(path) as archive:
        infos = [info for info in archive.infolist() if not hidden(info.filename)]
    for info in infos:  # zipfile reads no more of a member than its size says
        need(info.file_size <= MAX_FILE or not is_image(info.filename), f"{path}: {info.filename} unpacks to {info.file_size:,} bytes, "
             f"and an image may have {MAX_FILE:,}; remove it")
    return ({info.filename: (info.header_offset, info.file_size) for info in infos if is_image(info.filename)},
            [info.filename for info in infos if info.is_dir()])


@functools.lru_cache(maxsize=8)
def zip_handle(path: str, pid: int) -> zipfile.ZipFile:
    return zipfile.ZipFile(path)


def read_from_zip(path: str, key: np.void) -> np.ndarray:
    name = f"{path}: {key['name']}"
    with explained(name, MEND_IMAGE):
        # TRAP: processes that share a handle share its position in the file, so each one opens its own.
        data = zip_handle(path, os.getpid()).read(str(key["name"]))
    return decode(data, name)


def need_sane(path: str, packed: int, unpacked: int) -> None:
    """Raise UserError for an archive that unpacks to far more bytes than pictures do."""
    need(unpacked <= ALWAYS_ALLOWED + MAX_RATIO * packed, f"{path}: its {packed:,} bytes unpack to more than {ALWAYS_ALLOWED:,} and {MAX_RATIO} "
         "for each of them, as no archive of pictures does; unpack it yourself if you trust it")


def decompressed(path: str, cache: str | None) -> str:
    """.tar.gz, .tgz, .tar.xz -> path of a plain .tar in `cache`, made once: a compressed stream has no random access."""
    source = os.stat(path)
    key = digest(f"{os.path.basename(path)} {source.st_size} {source.st_mtime_ns}")[:12]
    folder = cache or os.path.dirname(path)
    target = os.path.join(folder, f"{os.path.basename(path)}.{key}.tar")
    if not os.path.exists(target):
        print(f"unpacking {path} once into {target}", file=sys.stderr)
        repair = f"is it complete, and is there room in {folder or '.'}?"
        with explained(path, repair):
            os.makedirs(folder or ".", exist_ok=True)
        checkpoint.sweep(folder or ".")  # a killed run may have left as much as it had unpacked
        opener = lzma.open if path.lower().endswith(".xz") else gzip.open
        with checkpoint.replacing(target) as plain, explained(path, repair), opener(path) as packed:
            while chunk := packed.read(1 << 20):
                plain.write(chunk)
                need_sane(path, source.st_size, plain.tell())
            plain.flush()
            list_tar(plain.name, path)  # only what can be read to its end gets the lasting name
    return target


# ------------------------------------------------------------------------------------------------
# arrays

def from_npz(path: str) -> ImageSet:
    with explained(path, "write it with np.savez(path, x=images, y=labels), and copy it completely"):
        with zipfile.ZipFile(path) as archive:
            need_sane(path, os.path.getsize(path), sum(info.file_size for info in archive.infolist()))
        with np.load(path, allow_pickle=False) as arrays:
            need("x" in arrays or "arr_0" in arrays, f"{path}: has no array x, only {' '.join(arrays)}; name the images x and the labels y")
            # Reading an array to its end compares its check sum, so every flipped bit is found.
            # the names that ADM gives to samples
            wanted = ("x", "y", "classes") if "x" in arrays else ("arr_0", "arr_1", "classes")
            x, y, names = (np.asarray(arrays[k]) if k in arrays else None for k in wanted)
    need(x.dtype == np.uint8 and x.ndim == 4 and x.shape[3] == 3 and x.size > 0,
         f"{path}: x is {x.dtype} {x.shape}; images must be uint8 (n, H, W, 3)")
    y = np.zeros(len(x), np.int64) if y is None else y
    need(y.shape == (len(x),) and np.issubdtype(y.dtype, np.integer) and y.min() >= 0,
         f"{path}: y is {y.dtype} {y.shape}; labels must be integers from 0 on, one for each of {len(x)} images")
    if names is None:
        names = range(y.max() + 1) if y.any() else ["all"]
    need(y.max() < len(names), f"{path}: label {y.max()} has no name; classes lists {len(names)}")
    labels, classes = y.astype(np.int64), [str(name) for name in names]
    fingerprint = digest(str(x.shape), x.tobytes(), labels.tobytes(), *classes)
    read = functools.partial(operator.getitem, x)
    return ImageSet(os.path.basename(path), classes, labels, fingerprint, np.arange(len(x)), read)


# ------------------------------------------------------------------------------------------------
# built-in shapes

def from_shapes(part: str) -> ImageSet:
    keys = shapes.numbers(part)
    fingerprint = digest(keys.tobytes(), *(shapes.draw_shape(key).tobytes() for key in keys[:100]))
    return ImageSet("shapes", list(shapes.SHAPES), shapes.shape_of(keys), fingerprint, keys, shapes.draw_shape)
