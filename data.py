"""Images in: folders, archives, arrays or built-in shapes become batches whose order nothing can disturb.

In       a path: a folder with one folder per class, or with images alone; the same as .tar, .zip, .tar.gz, .tgz
         or .tar.xz; an .npz with x uint8 (n, H, W, 3) and perhaps y int (n,) and classes; or "shapes"
Out      images uint8 (b, S, S, 3) and labels int64 (b,); to_float turns the images into the models' (B, 3, S, S)

    open_images ─► ImageSet ─► load(i) ─► resize_crop, mirror ─► ImageStream (training, endless)
                      └─ train_and_val            └────────────► eval_batches (in order, once)

Differs  the paper trains on ImageNet; the shapes are ours, so that everything can be tried without a download.
         Transparent images are put on white, 16-bit gray is scaled to 8 bits, EXIF rotation is applied.
Try      python data.py      (draws shapes.png)
"""
import contextlib
import functools
import glob
import gzip
import hashlib
import io
import itertools
import lzma
import math
import multiprocessing
import operator
import os
import shutil
import signal
import sys
import tarfile
import threading
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from config import UserError, need

ENDINGS = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm")
FORMATS = ("JPEG", "PNG", "BMP", "GIF", "WEBP", "TIFF", "PPM")  # no others: Pillow would run Ghostscript for an EPS
MEND_IMAGE = "replace or remove it, or train with --skip_bad"
MEND_ARCHIVE = "is it complete? copy it again"


@contextlib.contextmanager
def explained(what: str, repair: str):
    """Whatever the libraries raise inside becomes one UserError in one line: what, the reason, the repair."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # zipfile, tarfile, zlib, lzma, numpy and Pillow know some twenty kinds between them
        reason = " ".join(str(getattr(error, "strerror", None) or error).split()) or type(error).__name__
        raise UserError(f"{what}: {reason}; {repair}") from error


@contextlib.contextmanager
def replacing(path: str):
    """A temporary name beside `path`: it becomes `path` when the block ends well and vanishes when it does not."""
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.remove(temporary)


def digest(*parts: str | bytes) -> str:
    h = hashlib.sha256()
    for part in parts:
        h.update(part if isinstance(part, bytes) else part.encode("utf-8", "surrogateescape"))
    return h.hexdigest()[:32]


# ------------------------------------------------------------------------------------------------
# one image

def decode(data: bytes, name: str) -> np.ndarray:
    """The bytes of an image file -> uint8 (H, W, 3). Raises UserError that starts with `name`."""
    with explained(name, MEND_IMAGE):
        need(len(data) > 0, f"{name}: the file is empty; {MEND_IMAGE}")
        try:
            image = Image.open(io.BytesIO(data), formats=FORMATS)
        except UnidentifiedImageError:
            raise ValueError(f"not an image, or a torn one (it begins with {data[:12]!r})") from None
        # Decodes every pixel: only that finds all truncated files, Image.verify() passes some.
        ImageOps.exif_transpose(image, in_place=True)
        if image.mode == "F":
            raise ValueError("pixels are floating-point numbers of unknown range, save it with 8 or 16 bits")
        if image.mode.startswith("I"):                        # TRAP: convert("RGB") clips 16 bits to white
            values = np.asarray(image).astype(np.int64)
            if values.min() < 0 or values.max() > 65535:
                raise ValueError("gray values go beyond 16 bits, save it with 8 or 16 bits")
            gray = np.rint(values / 257).astype(np.uint8)     # 65535 = 255 * 257
            return np.repeat(gray[:, :, None], 3, axis=2)
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return np.asarray(image.convert("RGB"))


def read_image(path: str) -> np.ndarray:
    """An image file -> uint8 (H, W, 3). Raises UserError that names the file."""
    with explained(path, MEND_IMAGE), open(path, "rb") as file:
        data = file.read()
    return decode(data, path)


def resize_crop(image: np.ndarray, size: int, rng: np.random.Generator | None = None) -> np.ndarray:
    """uint8 (H, W, 3) -> uint8 (size, size, 3): the central square, or with `rng` a square anywhere.

    The random square's side is 1 to 1.25 times smaller than the shorter edge [ours].
    """
    H, W, _ = image.shape
    side = min(H, W)
    top, left = (H - side) // 2, (W - side) // 2
    if rng is not None:
        side = side / rng.uniform(1, 1.25)
        top, left = rng.uniform(0, H - side), rng.uniform(0, W - side)
    elif side == size:
        return image[top:top + size, left:left + size]
    # Cropping by `box` resizes only what is kept; Pillow's bicubic filter widens when it shrinks (antialias).
    box = (left, top, left + side, top + side)
    return np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC, box=box))


def augment(image: np.ndarray, size: int, key: tuple[int, ...], flip: bool, random_crop: bool) -> np.ndarray:
    """resize_crop and mirror at random, as a function of `key` = (seed, epoch, index) alone."""
    rng = np.random.default_rng(key)
    mirror = rng.random() < 0.5                               # drawn in any case, so that flip leaves the crops alone
    image = resize_crop(image, size, rng if random_crop else None)
    return image[:, ::-1] if flip and mirror else image


def to_float(images: Tensor) -> Tensor:
    """uint8 (B, H, W, 3) -> float32 (B, 3, H, W) in [-1, 1]."""
    return images.permute(0, 3, 1, 2).contiguous().float() / 127.5 - 1


def to_uint8(images: Tensor) -> Tensor:
    """float (B, 3, H, W) in [-1, 1] -> uint8 (B, H, W, 3); values outside are clamped."""
    x = (images.float() + 1) * 127.5
    return x.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)   # TRAP: without round, 63 of 256 values change


def save_grid(images: Tensor | np.ndarray, path: str, columns: int, scale: int = 1) -> None:
    """Write uint8 images (B, H, W, 3), each enlarged `scale` times, row by row with white margins, as one PNG."""
    images = torch.as_tensor(images).cpu().numpy().repeat(scale, axis=1).repeat(scale, axis=2)
    (B, H, W, _), margin = images.shape, 2
    rows = math.ceil(B / columns)
    sheet = np.full((margin + rows * (H + margin), margin + columns * (W + margin), 3), 255, np.uint8)
    for k, image in enumerate(images):
        y, x = margin + k // columns * (H + margin), margin + k % columns * (W + margin)
        sheet[y:y + H, x:x + W] = image
    with explained(path, "is the folder there, writable and not full?"), replacing(path) as temporary:
        Image.fromarray(sheet).save(temporary, format="PNG")


# ------------------------------------------------------------------------------------------------
# many images

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
        return shapes("val" if path.endswith("val") else "train")
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
    above = os.path.commonprefix([p[:-1] for p in parts.values()])[:max(0, depth - 2)]      # such as (cifar, train)
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
    return read_image(os.path.join(root, key["name"]))


def list_tar(path: str, shown: str) -> tuple[dict, list[str]]:
    """`shown` is the name for error messages."""
    files, folders, end = {}, [], 0
    with explained(shown, MEND_ARCHIVE), tarfile.open(path, "r:") as tar:
        while (member := tar.next()) is not None:
            tar.members = []                                  # or it keeps a kilobyte for every one of a million images
            end = member.offset_data + math.ceil(member.size / 512) * 512
            if hidden(member.name):
                continue
            if member.isdir():
                folders.append(member.name)
            elif is_image(member.name):
                need(member.isreg() and not member.issparse(), f"{shown}: {member.name} is a link or a sparse file; "
                     "pack it again with tar --dereference --hard-dereference")
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


def decompressed(path: str, cache: str | None) -> str:
    """.tar.gz, .tgz, .tar.xz -> path of a plain .tar in `cache`, made once: a compressed stream has no random access."""
    source = os.stat(path)
    key = digest(f"{os.path.basename(path)} {source.st_size} {source.st_mtime_ns}")[:12]
    folder = cache or os.path.dirname(path)
    target = os.path.join(folder, f"{os.path.basename(path)}.{key}.tar")
    for old in glob.glob(f"{glob.escape(target)}.*.tmp"):     # left behind by a killed run; a live one is being written
        with contextlib.suppress(FileNotFoundError):
            if time.time() - os.path.getmtime(old) > 600:
                os.remove(old)
    if not os.path.exists(target):
        print(f"unpacking {path} once into {target}", file=sys.stderr)
        with explained(path, f"is it complete, and is there room in {folder or '.'}?"):
            os.makedirs(folder or ".", exist_ok=True)
            opener = lzma.open if path.lower().endswith(".xz") else gzip.open
            with replacing(target) as temporary, opener(path) as packed, open(temporary, "wb") as plain:
                shutil.copyfileobj(packed, plain, 1 << 20)
                plain.flush()
                os.fsync(plain.fileno())
                list_tar(temporary, path)                     # only what can be read to its end gets the lasting name
    return target


# ------------------------------------------------------------------------------------------------
# arrays

def from_npz(path: str) -> ImageSet:
    with explained(path, "write it with np.savez(path, x=images, y=labels), and copy it completely"):
        with np.load(path, allow_pickle=False) as arrays:
            need("x" in arrays, f"{path}: has no array x, only {' '.join(arrays)}; name the images x and the labels y")
            # Reading an array to its end compares its check sum, so every flipped bit is found.
            x, y, names = (np.asarray(arrays[k]) if k in arrays else None for k in ("x", "y", "classes"))
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
# built-in shapes [ours]
#
# An image is a number: shape, colour, background, size, row and column are its digits. A seeded permutation of the
# numbers splits them, so training and held-out images never coincide. Integers only: the same bytes on every machine.

SHAPES = {  # is (x, y), seen from the centre with y downwards, inside the shape of radius r?
    "disc": lambda x, y, r: x * x + y * y <= r * r,
    "ring": lambda x, y, r: (x * x + y * y <= r * r) & (25 * (x * x + y * y) >= 9 * r * r),
    "square": lambda x, y, r: np.maximum(abs(x), abs(y)) <= r,
    "triangle": lambda x, y, r: (abs(y) <= r) & (2 * abs(x) <= y + r),
    "plus": lambda x, y, r: (np.maximum(abs(x), abs(y)) <= r) & (4 * np.minimum(abs(x), abs(y)) <= r),
    "cross": lambda x, y, r: (np.maximum(abs(x), abs(y)) <= r) & (5 * abs(abs(x) - abs(y)) <= 2 * r),
    "bar": lambda x, y, r: (abs(x) <= r) & (3 * abs(y) <= r),
    "pillar": lambda x, y, r: (abs(y) <= r) & (3 * abs(x) <= r),
    "diamond": lambda x, y, r: abs(x) + abs(y) <= r,
    "crescent": lambda x, y, r: (x * x + y * y <= r * r) & (25 * x * x + (5 * y + 3 * r) ** 2 >= 16 * r * r),
}
COLOURS = {"red": (240, 70, 55), "yellow": (255, 205, 50), "green": (75, 200, 90), "blue": (80, 160, 255),
           "pink": (250, 125, 215), "white": (255, 255, 255)}
BACKGROUNDS = {"black": (20, 20, 24), "navy": (24, 36, 104), "wine": (88, 16, 48), "forest": (12, 64, 44)}
# In eighths of a pixel, of 32. The places are half a pixel off the middle: no mirrored image is another image.
RADII = (68, 80, 92)
PLACES = (92, 108, 124, 140, 156)
DIGITS = (len(SHAPES), len(COLOURS), len(BACKGROUNDS), len(RADII), len(PLACES), len(PLACES))
TOTAL, HELD_OUT = math.prod(DIGITS), 2000


@functools.lru_cache(maxsize=None)
def coverage(shape: int, size: int, row: int, column: int) -> np.ndarray:
    """How many of the 4x4 points in each pixel lie inside: int (32, 32), 0 to 16."""
    point = 2 * np.arange(128) + 1
    x, y = point[None, :] - PLACES[column], point[:, None] - PLACES[row]
    inside = list(SHAPES.values())[shape](x, y, RADII[size])                 # (128, 128)
    return inside.reshape(32, 4, 32, 4).sum(axis=(1, 3))


def draw_shape(number: int) -> np.ndarray:
    """0 <= number < TOTAL -> uint8 (32, 32, 3)."""
    shape, colour, background, size, row, column = np.unravel_index(number, DIGITS)
    front, back = list(COLOURS.values())[colour], list(BACKGROUNDS.values())[background]
    covered = np.arange(17)[:, None]                          # sixteenths of a pixel
    mixed = (np.array(front) * covered + np.array(back) * (16 - covered) + 8) // 16      # (17, 3)
    return mixed.astype(np.uint8)[coverage(shape, size, row, column)]


def shapes(part: str) -> ImageSet:
    """The training images (part "train") or the held-out ones ("val")."""
    order = np.random.default_rng(0).permutation(TOTAL)
    keys = order[-HELD_OUT:] if part == "val" else order[:-HELD_OUT]
    fingerprint = digest(keys.tobytes(), *(draw_shape(key).tobytes() for key in keys[:100]))
    return ImageSet("shapes", list(SHAPES), np.unravel_index(keys, DIGITS)[0], fingerprint, keys, draw_shape)


# ------------------------------------------------------------------------------------------------
# batches

STOP_SIGNALS = {signal.SIGTERM, signal.SIGINT}


@contextlib.contextmanager
def stop_signals_blocked():
    """Processes started inside inherit the block; for this one, a signal comes through at the end."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def obey_only_the_parent(worker: int) -> None:
    """In a worker: signals to the whole process group must not stop it before the main process has saved.

    TRAP: a worker that simply ignores SIGTERM also ignores the main process, which at its exit would wait for ever.
    """
    def listen():
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != multiprocessing.parent_process().pid:
            pass
        os._exit(0)

    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    if hasattr(signal, "sigwaitinfo"):                        # a Mac has none
        threading.Thread(target=listen, daemon=True).start()


class Batches:
    """Batches by number, as DataLoader's map-style data set.

    plan   number -> [(index, transform)], the images of that batch
    """

    def __init__(self, dataset: ImageSet, plan: Callable, skip_bad: bool):
        self.dataset, self.plan = dataset, plan
        self.limit = max(1, len(dataset) // 100) if skip_bad else 0           # unreadable images to put up with

    def __getitem__(self, number: int) -> tuple[Tensor | None, Tensor | None, list[str]]:
        """images uint8 (b, S, S, 3), labels int64 (b,), errors. No images when there are more errors than the limit.

        Errors travel as text: DataLoader would wrap an exception of a worker into pages of traceback.
        """
        images, labels, errors = [], [], []
        for index, transform in self.plan(number):
            while len(images) == len(labels):                 # until one more image has been read
                try:
                    images.append(transform(self.dataset.load(index)))
                except UserError as error:
                    errors.append(str(error))
                    if len(set(errors)) > self.limit:
                        return None, None, errors
                    index = (index + 1) % len(self.dataset)   # the next one stands in, on every run alike
            labels.append(self.dataset.labels[index])
        return torch.from_numpy(np.stack(images)), torch.from_numpy(np.array(labels)), errors

    def stream(self, numbers, workers: int):
        """Yield (images, labels) for each of `numbers`, prepared ahead by `workers` processes of one thread each."""
        loader = torch.utils.data.DataLoader(
            self, batch_size=None, sampler=numbers, num_workers=workers, worker_init_fn=obey_only_the_parent,
            # By fork, whatever Python's default: workers then share the keys' memory and inherit the block below.
            multiprocessing_context="fork" if workers and sys.platform == "linux" else None,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator())                      # or it draws from the global one and disturbs the training
        skipped = set()
        with stop_signals_blocked() if workers else contextlib.nullcontext():
            batches = iter(loader)
        for images, labels, errors in batches:
            for error in errors:
                if self.limit and error not in skipped:
                    print(f"skipped {error}", file=sys.stderr)
                skipped.add(error)
            if len(skipped) > self.limit:
                raise UserError(errors[-1] if not self.limit else
                                f"{len(skipped)} of {len(self.dataset)} images cannot be read, more than 1%; mend the data")
            yield images, labels


@functools.lru_cache(maxsize=2)
def permutation(n: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(n)


class ImageStream:
    """Training batches without end: iterate for (images uint8 (b, S, S, 3), labels int64 (b,)) of this rank.

    The order is one endless row of positions. Position p is image permutation(epoch p // n)[p % n], and step s takes the
    positions from s * batch_size on, cut into one piece per rank. So neither the number of ranks or workers nor a
    restart (start_step) changes which images a step sees, and a data set may be smaller than a batch.

    batch_size   images per step over all ranks
    skip_bad     the next image stands in for an unreadable one; above 1% of the data set (and one) it is a UserError
    Raises UserError with the first unreadable image's name unless skip_bad.
    """

    def __init__(self, dataset: ImageSet, image_size: int, batch_size: int, seed: int, flip: bool = False,
                 random_crop: bool = False, rank: int = 0, world: int = 1, start_step: int = 0, workers: int = 0,
                 skip_bad: bool = False):
        need(batch_size % world == 0, f"batch_size {batch_size} is not a multiple of the {world} processes; "
             f"try {max(1, batch_size // world) * world}")
        need(seed >= 0, f"seed {seed} is negative; give 0 or more")
        self.dataset, self.image_size, self.batch_size, self.seed = dataset, image_size, batch_size, seed
        self.flip, self.random_crop, self.rank, self.world = flip, random_crop, rank, world
        self.start_step, self.workers, self.skip_bad = start_step, workers, skip_bad

    def plan(self, step: int) -> list:
        n, share = len(self.dataset), self.batch_size // self.world
        first = step * self.batch_size + self.rank * share
        batch = []
        for position in range(first, first + share):
            epoch, place = divmod(position, n)
            index = int(permutation(n, self.seed, epoch)[place])
            batch.append((index, functools.partial(augment, size=self.image_size, key=(self.seed, epoch, index),
                                                   flip=self.flip, random_crop=self.random_crop)))
        return batch

    def __iter__(self):
        return Batches(self.dataset, self.plan, self.skip_bad).stream(itertools.count(self.start_step), self.workers)


def eval_plan(indices: np.ndarray, image_size: int, batch_size: int, number: int) -> list:
    transform = functools.partial(resize_crop, size=image_size)
    return [(int(index), transform) for index in indices[number * batch_size:(number + 1) * batch_size]]


def eval_batches(dataset: ImageSet, image_size: int, batch_size: int, indices=None, workers: int = 0,
                 skip_bad: bool = False):
    """Yield (images uint8 (b, S, S, 3), labels int64 (b,)) once, in order, cropped at the centre; the last may be short."""
    indices = np.arange(len(dataset)) if indices is None else np.asarray(indices)
    plan = functools.partial(eval_plan, indices, image_size, batch_size)
    yield from Batches(dataset, plan, skip_bad).stream(range(math.ceil(len(indices) / batch_size)), workers)


if __name__ == "__main__":
    dataset = open_images("shapes")
    rows = [np.flatnonzero(dataset.labels == k)[:12] for k in range(len(dataset.classes))]   # one row per class
    save_grid(np.stack([dataset.load(i) for i in np.concatenate(rows)]), "shapes.png", columns=12, scale=2)
    print(f"shapes.png: {', '.join(dataset.classes)}, twelve of each")
    pixels, bits = dataset.load(0).size * 8, math.log2(TOTAL)
    print(f"\nThere are {TOTAL:,} such images: {bits:.1f} bits (the log2) name one of them, its pixels take {pixels:,} bits.")
    print("A token of a codebook of 512 carries 9 bits. How few tokens could say everything, and in which order?")
