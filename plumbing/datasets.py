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
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np

from plumbing import shapes
from plumbing.archives import (
    Listing,
    Source,
    decompressed,
    digest,
    kind_of,
    list_folder,
    list_tar,
    list_zip,
    note,
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
# A fingerprint reads so many files at most, and of them so many bytes together: a second or two
# from a disk without moving parts, whatever the size of the data set.
FILES_READ, BYTES_READ = 10_000, 2 ** 28
# How many held-out images are looked for among those that are learned from, among how many at most,
# and among how many where files have to be decoded.
SOUGHT, AMONG, DECODED = 500, 60_000, 2_000
WHAT_IS_READ = "a folder, .tar .tar.gz .tgz .tar.xz .tar.bz2 .zip .npz, or shapes"


class Prints(NamedTuple):
    """What the fingerprint of files was made of."""
    listing: str          # a digest of their names, sizes and classes, and of what was cut away
    keys: np.ndarray      # (m,) of the files whose content was looked at
    content: np.ndarray   # (m,) int64, a digest of each


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Labelled images, wherever they lie. Holds no open file, so any process may use a copy."""
    name: str
    classes: list[str]
    labels: np.ndarray   # int64 (n,)
    fingerprint: str     # hexadecimal; follows from the content, not from where it lies: below
    # What `read` asks for. Arrays, since workers share them: a list's objects are copied by being
    # looked at.
    keys: np.ndarray     # (n,)
    read: Callable       # key -> uint8 (H, W, 3)
    peek: Callable | None = None  # key, n -> n bytes or less of its file; None: there are no files
    prints: Prints | None = None
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
        cut = np.asarray(indices, np.int64).tobytes()
        prints = self.prints and self.prints._replace(listing=digest(self.prints.listing, cut))
        return replace(self, labels=self.labels[indices], fingerprint=digest(self.fingerprint, cut),
                       keys=self.keys[indices], prints=prints, kept={})

    def broken_since(self, listing: str, content: np.ndarray) -> list[str]:
        """What a set with these prints must be for both to be the same: names of its files that
        have turned bad since. [] where anything else has changed."""
        ours = self.prints
        if ours is None or (listing, len(content)) != (ours.listing, len(ours.content)):
            return []
        broken = []
        for key in ours.keys[ours.content != content]:
            try:
                self.read(key)
                return []  # another picture
            except UserError:
                broken.append(str(key["name"]))
        return broken


def open_images(path: str) -> ImageSet:
    """Open `path` in any form that this file's first lines list; "shapes:val": held-out shapes.

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
            return from_shards(path, Source("tar", path), found.shards)
        return from_files(path, found, Source("folder", path))
    kind = kind_of(path)
    if kind == "npz":
        return from_npz(path)
    if kind == "zip":
        return from_files(path, list_zip(path), Source("zip", path))
    if kind in ("tar", "gz", "xz", "bz2"):
        source = Source("tar", path, decompressed(path, kind) if kind != "tar" else b"")
        found = list_tar(source, path)
        return from_shards(path, source, [""]) if found.texts else from_files(path, found, source)
    what = f"a .{kind} file, and " if kind else ""
    raise UserError(f"{path}: {what}none of {WHAT_IS_READ}; put images into a folder")


def train_and_val(data: str, val_data: str, holdout: int,
                  seed: int) -> tuple[ImageSet, ImageSet]:
    """Images to train on, and held-out ones: `val_data` if given, or else some of `data`.

    holdout   how many at most; never more than a tenth, and at least one
    A note says how many of the held-out images are learned from, as in a copy of `data`. It is no
    error: to learn a few images by heart is a test of a new model. Which of them are the same,
    seen_before() says.
    """
    train = open_images(data)
    if val_data:
        val = open_images(val_data)
        ours, theirs = set(train.classes), set(val.classes)
        need(val.classes in (train.classes, ["all"]),
             f"{val_data}: its classes are not those of {data}, in this order "
             f"(missing: {some_of(ours - theirs)}; extra: {some_of(theirs - ours)}); "
             "give both the same class folders")
        tell_seen(train, val, val_data, data)
        return train, val
    if data == "shapes":
        return train, open_images("shapes:val")
    n = len(train)
    if n == 1:
        note(f"{data} holds a single image, which is used for training and as held-out image")
        return train, train
    count = max(1, min(holdout, n // 10))
    shuffled = np.random.default_rng(seed).permutation(n)
    learned, val = train.subset(np.sort(shuffled[count:])), train.subset(np.sort(shuffled[:count]))
    tell_seen(learned, val, data, "what is left of it, so it holds them twice")
    return learned, val


# ------------------------------------------------------------------------------------------------
# which images are these?

def prints_of(listing: Iterable[str], keys: np.ndarray, peek: Callable) -> tuple[str, Prints]:
    """Lines with names, sizes and classes, and the files -> a fingerprint, what it was made of.

    Of files beside their names and sizes it sees some of their bytes.

    Up to FILES_READ files all are looked at, of more a fixed choice of so many; a file that is no
    larger than its share of BYTES_READ is read whole, of a larger one some pieces (peeked). So it
    does not see a change between the pieces of a large file. Of n > FILES_READ files, k changed
    ones escape it with a chance of (1 - FILES_READ / n)^k: of a million, 1,000 in 1 of 23,000.
    """
    chosen = keys[np.sort(np.random.default_rng(0).permutation(len(keys))[:FILES_READ])]
    content = [print_of(key, peek, BYTES_READ // len(chosen)) for key in chosen]
    listed = digest(*listing)
    digests = np.array([int(text[:15] or b"0", 16) for text in content], np.int64)
    return digest(listed, *content), Prints(listed, chosen, digests)


def print_of(key: np.void, peek: Callable, most: int) -> bytes:
    """A digest of at most so many bytes of a file; b"" for one that cannot be read."""
    try:
        return digest(peek(key, most)).encode()
    except UserError:  # whoever loads it will say so, or pass it over
        return b""


def bytes_of(images: ImageSet, i: int) -> bytes:
    return print_of(images.keys[i], images.peek, BYTES_READ)


def pixels_of(images: ImageSet, i: int) -> bytes:
    """A digest of all of an image's pixels; b"" for one that cannot be read."""
    try:
        image = images.load(i)
    except UserError:
        return b""
    return digest(str(image.shape), image.tobytes()).encode()


def seen_before(learned: ImageSet, held: ImageSet) -> tuple[int, int]:
    """-> how many of the held-out images are among those learned from, and how many were sought.

    Files are the same when their bytes are, whatever they are called and wherever they lie; an
    array and a file, or two arrays, when their pixels are. At most SOUGHT of `held`, chosen at
    random, are sought among at most AMONG of `learned` (files of their sizes, with BYTES_READ
    together, or arrays), or DECODED files: where there are more, the first number is too small,
    though hardly 0 for a copy of them all. It does not see a picture that was saved again in
    another format, size or quality.
    """
    rng = np.random.default_rng(0)
    sought = rng.permutation(len(held))[:SOUGHT]
    if learned.fingerprint == held.fingerprint:
        return len(sought), len(sought)
    if learned.peek and held.peek:
        sizes = learned.keys["size"]
        among = np.flatnonzero(np.isin(sizes, held.keys["size"][sought]))
        among = rng.permutation(among)[:AMONG]
        among, looked_at = among[sizes[among].cumsum() <= BYTES_READ], bytes_of
    else:
        most = DECODED if learned.peek else AMONG
        among, looked_at = rng.permutation(len(learned))[:most], pixels_of
    known = {looked_at(learned, j) for j in np.sort(among)} - {b""}
    return sum(looked_at(held, i) in known for i in sought), len(sought)


def tell_seen(learned: ImageSet, held: ImageSet, path: str, other: str) -> None:
    """A note when images of `held`, from `path`, are learned from: they are in `other` too."""
    seen, sought = seen_before(learned, held)
    if seen:
        note(f"{path}: {seen} of {sought} images that were looked for are also in {other}: they "
             "are learned from, not held out, and what is told of them looks too good")


# ------------------------------------------------------------------------------------------------
# classes

def some_of(names) -> str:
    """a, b, c, d, e and 7 more"""
    names = sorted(names)
    more = f" and {len(names) - 5:,} more" if len(names) > 5 else ""
    return (", ".join(map(str, names[:5])) or "none") + more


def composed(name: str) -> str:
    """A name as Linux and Windows write it: a Mac may keep é as e and an accent, one by one."""
    return unicodedata.normalize("NFC", name)


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
             f"images; its {len(present):,} classes are {some_of(present.tolist())}")
    return [str(k) for k in present.tolist()], labels.reshape(-1).astype(np.int64)


# ------------------------------------------------------------------------------------------------
# files

def from_files(path: str, found: Listing, source: Source) -> ImageSet:
    """Names -> ImageSet. The last two levels are class/image, or the last one is images.

    What lies above must be shared.
    """
    passed = found.passed_over()
    need(found.files, f"{path}: holds no images{f' ({passed})' if passed else ''}; "
         f"their names end in {' '.join(ENDINGS)}")
    if passed:
        note(f"{path}: {passed}")
    separator = separator_of(found.files)
    parts = {name: split(composed(name), separator) for name in found.files}
    names = sorted(found.files, key=lambda name: (parts[name], name))
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
        twice = Counter(composed(c) for c in {split(name, separator)[-2] for name in names})
        for name in (printable(name) for name, times in twice.items() if times > 1):
            note(f"{path}: {name} is there twice, in two spellings of Unicode; taken as one class")
        labels = np.array([number[parts[name][-2]] for name in names], np.int64)
        folders = [split(composed(name), separator) for name in found.folders]
        empty = {p[-1] for p in folders if p and p[:-1] == above} - set(classes)
        need(not empty, f"{path}: no images in class folder {some_of(empty)}"
             f"{f' ({passed})' if passed else ''}; fill or remove it")
    rows = [("", name, *found.files[name]) for name in names]
    listing = (f"{'/'.join(parts[name][len(above):])} {found.files[name][1]}\n" for name in names)
    return listed(path, source, rows, classes, labels, listing)


def listed(path: str, source: Source, rows: list, classes: list[str], labels: np.ndarray,
           listing: Iterable[str]) -> ImageSet:
    """rows: (shard, name, offset, size) of each image."""
    shard, name = (max(len(row[k]) for row in rows) or 1 for k in (0, 1))
    keys = np.array(rows, [("shard", f"U{shard}"), ("name", f"U{name}"),
                           ("offset", np.int64), ("size", np.int64)])
    fingerprint, prints = prints_of(listing, keys, source.peek)
    return ImageSet(os.path.basename(os.path.abspath(path)), [printable(c) for c in classes],
                    labels, fingerprint, keys, source.read, source.peek, prints)


def from_shards(path: str, source: Source, shards: list[str]) -> ImageSet:
    """WebDataset: in each tar a.jpg lies beside a.cls, which says its class by number or name.

    shards   names of the tar files; [""]: `source` itself is one
    """
    rows, texts, passed = [], [], Listing()
    for shard in sorted(shards):
        shown = os.path.join(path, shard) if shard else path
        found = list_tar(source, shown)
        need(found.texts, f"{shown}: has no .cls files that say the classes; unpack it into a "
             "folder named after its class, or give it alone")
        passed.passed.update(found.passed)
        keys = set()
        for name in sorted(found.files, key=lambda name: (composed(name), name)):
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
            texts.append(composed(text))
    need(rows, f"{path}: holds no images; their names end in {' '.join(ENDINGS)}")
    if passed.passed:
        note(f"{path}: {passed.passed_over()}")
    if all(text.isascii() and text.isdigit() and len(text) < 19 for text in texts):
        classes, labels = numbered_classes(path, np.array([int(text) for text in texts]))
    else:
        classes, labels = np.unique(texts, return_inverse=True)
        classes, labels = classes.tolist(), labels.astype(np.int64)
    listing = (f"{composed(name)} {size} {classes[label]}\n"
               for (_, name, _, size), label in zip(rows, labels))
    return listed(path, source, rows, classes, labels, listing)


# ------------------------------------------------------------------------------------------------
# arrays

def from_npz(path: str) -> ImageSet:
    with explained(path, "write it with np.savez(path, x=images, y=labels), copy it completely"):
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
        classes, labels = [composed(str(name)) for name in names], y.astype(np.int64)
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
