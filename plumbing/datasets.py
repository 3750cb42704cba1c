"""Many images: a folder, an archive, arrays or the built-in shapes behind one interface.

In       a path: a folder with one folder per class, or with images alone; the same as .tar, .zip,
         .tar.gz, .tar.xz or .tar.bz2; shards of WebDataset, one .tar with .jpg and .cls or a folder
         of them; an .npz with x uint8 (n, H, W, 3) and perhaps y int (n,) and classes, or with
         ADM's names for samples, arr_0 and arr_1; or "shapes"
Out      ImageSet: .load(i) uint8 (H, W, 3), .labels int64 (n,), .classes, .fingerprint

    open_images ─► ImageSet ─► train_and_val ─► batches.py
         folder, .tar, .zip   from_files   names are listed now, an image is read when asked for
         .tar with .cls       from_shards  likewise
         .npz                 from_npz     all of it is held in memory
         shapes               from_shapes  an image is drawn when it is asked for

Differs  the paper trains on ImageNet; any images will do here, and the shapes are ours
"""
import functools
import operator
import os
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from plumbing import shapes
from plumbing.archives import (
    Listing,
    decompressed,
    digest,
    kind_of,
    list_folder,
    list_tar,
    list_zip,
    need_sane,
    note,
    read_from_folder,
    read_from_shard,
    read_from_tar,
    read_from_zip,
    separator_of,
    split,
)
from plumbing.flags import UserError, need
from plumbing.images import ENDINGS, explained

# Beyond ImageNet-21k; more are numbers of images, or hashes.
MAX_CLASSES = 100_000
# Bytes of an image that is small, and of the small images that are kept once they have been read
# (CIFAR-10's 60,000 make a training 0.35 GB larger).
SMALL, KEEP = 2 ** 14, 2 ** 28
WHAT_IS_READ = "a folder, .tar .tar.gz .tgz .tar.xz .tar.bz2 .zip .npz, or shapes"


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Labelled images, wherever they lie. Holds no open file, so any process may use a copy."""
    name: str
    classes: list[str]
    labels: np.ndarray   # int64 (n,)
    fingerprint: str     # hexadecimal; follows from the content, not from where it lies
    # What `read` asks for. Arrays, since workers share them: a list's objects are copied by being
    # looked at.
    keys: np.ndarray     # (n,)
    read: Callable       # key -> uint8 (H, W, 3)
    kept: dict[int, np.ndarray] = field(default_factory=dict, repr=False)

    def __len__(self) -> int:
        return len(self.labels)

    def load(self, i: int, keep: bool = False) -> np.ndarray:
        """Image i in full size, uint8 (H, W, 3). Raises UserError if it cannot be read.

        keep   a small one stays in memory, read-only, for the next time: opening a file of 32x32
               pixels and decoding it takes 0.2 ms, which 64 times is a tenth of a small training
               step [ours: measured]
        """
        image = self.kept.get(i)
        if image is None:
            image = self.read(self.keys[i])
            if keep and image.nbytes <= SMALL and len(self.kept) * image.nbytes < KEEP:
                image.flags.writeable = False
                self.kept[i] = image
        return image

    def subset(self, indices: np.ndarray) -> "ImageSet":
        fingerprint = digest(self.fingerprint, np.asarray(indices, np.int64).tobytes())
        return ImageSet(self.name, self.classes, self.labels[indices], fingerprint,
                        self.keys[indices], self.read)


def open_images(path: str, cache: str | None = None) -> ImageSet:
    """Open `path` in any form that this file's first lines list; "shapes:val": held-out shapes.

    cache   folder for the plain .tar made once of a compressed one; None: beside it
    Raises UserError when it is missing, torn or holds no images.
    """
    if path in ("shapes", "shapes:val"):
        if os.path.exists(path):
            note(f"{path} are the built-in shapes; for the folder of that name give ./{path}")
        return from_shapes("val" if path.endswith("val") else "train")
    need(os.path.exists(path),
         f"{path}: no such file or folder; give images as in --help, or shapes")
    if os.path.isdir(path):
        found = list_folder(path)
        if found.shards and not found.files:
            return from_shards(path, path, found.shards)
        return from_files(path, found, functools.partial(read_from_folder, path))
    kind = kind_of(path)
    if kind == "npz":
        return from_npz(path)
    if kind == "zip":
        return from_files(path, list_zip(path), functools.partial(read_from_zip, path))
    if kind in ("tar", "gz", "xz", "bz2"):
        plain = path if kind == "tar" else decompressed(path, kind, cache)
        found = list_tar(plain, path)
        if found.texts:
            return from_shards(path, plain, [""])
        return from_files(path, found, functools.partial(read_from_tar, plain))
    what = f"a .{kind} file, and " if kind else ""
    raise UserError(f"{path}: {what}none of {WHAT_IS_READ}; put images into a folder")


def train_and_val(data: str, val_data: str, holdout: int, seed: int,
                  cache: str | None = None) -> tuple[ImageSet, ImageSet]:
    """Images to train on, and held-out ones: `val_data` if given, or else some of `data`.

    holdout   how many at most; never more than a tenth, and at least one
    """
    train = open_images(data, cache)
    if val_data:
        val = open_images(val_data, cache)
        ours, theirs = set(train.classes), set(val.classes)
        need(val.classes in (train.classes, ["all"]),
             f"{val_data}: its classes are not those of {data}, in this order "
             f"(missing: {some_of(ours - theirs)}; extra: {some_of(theirs - ours)}); "
             "give both the same class folders")
        return train, val
    if data == "shapes":
        return train, open_images("shapes:val")
    n = len(train)
    if n == 1:
        note(f"{data} holds a single image, which is used for training and as held-out image")
        return train, train
    count = max(1, min(holdout, n // 10))
    shuffled = np.random.default_rng(seed).permutation(n)
    return train.subset(np.sort(shuffled[count:])), train.subset(np.sort(shuffled[:count]))


# ------------------------------------------------------------------------------------------------
# classes

def some_of(names, most: int = 5) -> str:
    """a, b, c, d, e and 7 more"""
    names = sorted(names)
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return (", ".join(names[:most]) or "none") + more


def printable(name: str) -> str:
    """A name that need not be UTF-8 -> one that any file and any terminal takes."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def numbered_classes(path: str, numbers: np.ndarray) -> tuple[list[str], np.ndarray]:
    """Class numbers -> names of those that have images, and int64 labels that count only them.

    As with folders, a class without images is none: nothing could be learned of it.
    """
    present, labels = np.unique(numbers, return_inverse=True)
    need(len(present) <= MAX_CLASSES, f"{path}: {len(present):,} different labels are more than "
         f"{MAX_CLASSES:,}; are they labels of classes, or numbers of images?")
    first, last = int(present[0]), int(present[-1])
    empty = last - first + 1 - len(present)
    if first not in (0, 1) or empty:
        note(f"{path}: labels go from {first} to {last}, {empty:,} numbers between are without "
             f"images; its {len(present):,} classes are {some_of_numbers(present)}")
    return [str(k) for k in present.tolist()], labels.reshape(-1).astype(np.int64)


def some_of_numbers(numbers: np.ndarray) -> str:
    return ", ".join(map(str, numbers[:5].tolist())) + (" ..." if len(numbers) > 5 else "")


# ------------------------------------------------------------------------------------------------
# files

def from_files(path: str, found: Listing, read: Callable) -> ImageSet:
    """Names -> ImageSet. The last two levels are class/image, or the last one is images.

    What lies above must be shared.
    """
    passed = found.passed_over()
    need(found.files, f"{path}: holds no images{f' ({passed})' if passed else ''}; "
         f"their names end in {' '.join(ENDINGS)}")
    if passed:
        note(f"{path}: {passed}")
    separator = separator_of(found.files)
    parts = {name: split(name, separator) for name in found.files}
    names = sorted(found.files, key=parts.get)
    depth = max(len(p) for p in parts.values())
    # such as (cifar, train)
    above = os.path.commonprefix([p[:-1] for p in parts.values()])[:max(0, depth - 2)]
    by_depth = sorted(names, key=lambda name: len(parts[name]))
    need(depth - len(above) <= 2 and len(parts[by_depth[0]]) == depth,
         f"{path}: images must lie in one folder per class, or all in one, but there are "
         f"{by_depth[0]} and {by_depth[-1]}; give the folder that holds the classes")
    if depth - len(above) == 1:
        classes, labels = ["all"], np.zeros(len(names), np.int64)
    else:
        classes = sorted({p[-2] for p in parts.values()})
        number = {c: k for k, c in enumerate(classes)}
        labels = np.array([number[parts[name][-2]] for name in names], np.int64)
        folders = [split(name, separator) for name in found.folders]
        empty = {p[-1] for p in folders if p and p[:-1] == above} - set(classes)
        need(not empty, f"{path}: no images in class folder {some_of(empty)}"
             f"{f' ({passed})' if passed else ''}; fill or remove it")
    dtype = [("name", f"U{max(map(len, names))}"), ("offset", np.int64), ("size", np.int64)]
    keys = np.array([(name, *found.files[name]) for name in names], dtype)
    fingerprint = digest(*(f"{'/'.join(parts[name][len(above):])} {found.files[name][1]}\n"
                           for name in names))
    return ImageSet(os.path.basename(os.path.abspath(path)), [printable(c) for c in classes],
                    labels, fingerprint, keys, read)


def from_shards(path: str, root: str, shards: list[str]) -> ImageSet:
    """WebDataset: in each tar a.jpg lies beside a.cls, which says its class by number or name.

    root, shards   the tar files are root/shard; one alone is root, with the shard ""
    """
    rows, texts, passed = [], [], Listing()
    for shard in sorted(shards):
        shown = os.path.join(path, shard) if shard else path
        found = list_tar(os.path.join(root, shard) if shard else root, shown)
        need(found.texts, f"{shown}: has no .cls files that say the classes; unpack it into a "
             "folder named after its class, or give it alone")
        passed.passed.update(found.passed)
        keys = set()
        for name in sorted(found.files):
            # WebDataset's rule: what follows the first dot tells the files of a sample apart.
            key, _, ending = os.path.basename(name).partition(".")
            key = os.path.join(os.path.dirname(name), key)
            if f".{ending.lower()}" not in ENDINGS:  # such as seg.png, a mask beside the image
                passed.pass_over(name)
                continue
            where = f"{shown}: {name}"
            need(key not in keys, f"{where} is a second image of its sample; keep one")
            text = found.texts.get(f"{key}.cls", "")
            need(text, f"{where} has no class; add {key}.cls, or pack it without any .cls")
            keys.add(key)
            rows.append((shard, name, *found.files[name]))
            texts.append(text)
    need(rows, f"{path}: holds no images; their names end in {' '.join(ENDINGS)}")
    if passed.passed:
        note(f"{path}: {passed.passed_over()}")
    if all(text.isascii() and text.isdigit() and len(text) < 19 for text in texts):
        classes, labels = numbered_classes(path, np.array([int(text) for text in texts]))
    else:
        classes, labels = np.unique(texts, return_inverse=True)
        classes, labels = classes.tolist(), labels.astype(np.int64)
    width = [max(len(row[k]) for row in rows) or 1 for k in (0, 1)]
    dtype = [("shard", f"U{width[0]}"), ("name", f"U{width[1]}"),
             ("offset", np.int64), ("size", np.int64)]
    fingerprint = digest(*(f"{name} {size} {classes[label]}\n"
                           for (_, name, _, size), label in zip(rows, labels)))
    return ImageSet(os.path.basename(os.path.abspath(path)), classes, labels, fingerprint,
                    np.array(rows, dtype), functools.partial(read_from_shard, root))


# ------------------------------------------------------------------------------------------------
# arrays

def from_npz(path: str) -> ImageSet:
    with explained(path, "write it with np.savez(path, x=images, y=labels), copy it completely"):
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(info.file_size for info in archive.infolist())
        need_sane(path, os.path.getsize(path), unpacked)
        with np.load(path, allow_pickle=False) as arrays:
            need("x" in arrays or "arr_0" in arrays, f"{path}: has no array x, only "
                 f"{' '.join(arrays)}; name the images x and the labels y")
            # The names that ADM gives to samples are the second. Reading an array to its end
            # compares its check sum, so every flipped bit is found.
            wanted = ("x", "y") if "x" in arrays else ("arr_0", "arr_1")
            x, y, names = (np.asarray(arrays[name]) if name in arrays else None
                           for name in (*wanted, "classes"))
    need(x.dtype == np.uint8 and x.ndim == 4 and x.shape[3] == 3 and x.size > 0,
         f"{path}: x is {x.dtype} {x.shape}; images must be uint8 (n, H, W, 3)")
    y = np.zeros(len(x), np.int64) if y is None else y
    need(y.shape == (len(x),) and np.issubdtype(y.dtype, np.integer) and y.min() >= 0,
         f"{path}: y is {y.dtype} {y.shape}; "
         f"labels must be integers from 0 on, one for each of {len(x)} images")
    # TRAP: arithmetic in the labels' own type overflows: uint8 255 + 1 is 0.
    last = int(y.max())
    if names is not None:
        need(last < len(names),
             f"{path}: label {last} has no name; classes lists {len(names)}")
        classes, labels = [str(name) for name in names], y.astype(np.int64)
        empty = [classes[k] for k in np.setdiff1d(np.arange(len(names)), labels)]
        if empty:
            note(f"{path}: no images of {some_of(empty)}; nothing can be learned of "
                 f"{'it' if len(empty) == 1 else 'them'}")
    elif last == 0:
        classes, labels = ["all"], y.astype(np.int64)
    else:
        classes, labels = numbered_classes(path, y)
    fingerprint = digest(str(x.shape), x.tobytes(), labels.tobytes(), *classes)
    read = functools.partial(operator.getitem, x)
    return ImageSet(os.path.basename(path), classes, labels, fingerprint, np.arange(len(x)), read)


# ------------------------------------------------------------------------------------------------
# built-in shapes

def from_shapes(part: str) -> ImageSet:
    keys = shapes.numbers(part)
    fingerprint = digest(keys.tobytes(), *(shapes.draw_shape(key).tobytes() for key in keys[:100]))
    return ImageSet("shapes", list(shapes.SHAPES), shapes.shape_of(keys), fingerprint, keys,
                    shapes.draw_shape)
