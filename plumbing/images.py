"""One image: from a file's bytes to a square of pixels, to floats and back, and onto a sheet.

In       the bytes of an image file, in one of FORMATS
Out      decode       uint8 (H, W, 3)
         resize_crop  uint8 (S, S, 3), augment the same with a random crop and mirror
         to_float     float32 (B, 3, S, S) in [-1, 1], what models take; to_uint8 is the way back
Differs  the paper leaves these open: transparent images are put on white, 16-bit gray is scaled to
         8 bits, EXIF rotation is applied. What cannot be decoded to its last pixel is refused by
         name; of the rest of a file, nothing but the rotation is believed
Try      python -m plumbing.images      (rounds and truncates 256 values; one brings them back)
"""
import contextlib
import io
import math
import warnings

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from plumbing import checkpoint
from plumbing.flags import UserError, need

Image.init()  # or Pillow knows its usual formats only
# What people keep pictures in. No others: Pillow would run Ghostscript for an EPS.
FORMATS = [name for name in ("JPEG", "PNG", "BMP", "DIB", "GIF", "WEBP", "TIFF", "PPM", "AVIF",
                             "JPEG2000", "QOI", "PCX", "SGI", "TGA") if name in Image.OPEN]
# A .pfm holds floating-point numbers, mostly depths beside a picture.
ENDINGS = tuple(sorted(ending for ending, name in Image.registered_extensions().items()
                       if name in FORMATS and ending != ".pfm"))
MEND_IMAGE = "replace or remove it"
# What a viewer does to the stored pixels, by EXIF's number for the orientation.
TURNS = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180,
         4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE,
         6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
         8: Image.Transpose.ROTATE_90}


# What people find under the name of a picture: the place of its first bytes, these, what it is.
OTHERS = (
    (0, b"\xff\xd8\xff", "a torn JPEG"), (0, b"\x89PNG", "a torn PNG"),
    (4, b"ftyphei", "a HEIC picture"), (4, b"ftypmif1", "a HEIC picture"),
    (4, b"ftypavi", "an AVIF picture, torn or beyond this Pillow"), (4, b"ftyp", "an MP4 video"),
    (0, b"II*\0", "a camera's raw picture, or a torn TIFF"), (0, b"8BPS", "a Photoshop picture"),
    (0, b"%PDF", "a PDF page"), (0, b"%!PS", "a PostScript page"), (0, b"PK\3\4", "a zip archive"),
    (0, b"version https://git-lfs", "a Git LFS pointer, whose file git lfs pull would fetch"))


def kind_of_bytes(data: bytes) -> str:
    """What a file is that Pillow does not know, by its first bytes, in words for a person."""
    for place, beginning, what in OTHERS:
        if data[place:].startswith(beginning):
            return what if "torn" in what else f"{what}, whatever its name says"
    if b"<html" in data[:4096].lower():
        return "an HTML page, perhaps the answer of a server that did not have the picture"
    with contextlib.suppress(UnicodeDecodeError):
        words = " ".join(data[:4096].decode().split())
        if words.isprintable():
            return f"not an image but a text that begins with {words[:30]!r}"
    return f"not an image, or a torn one (it begins with {data[:12]!r})"


@contextlib.contextmanager
def explained(what: str, repair: str):
    """Whatever libraries raise inside becomes one UserError in one line: what, reason, repair."""
    try:
        yield
    except UserError:
        raise
    # zipfile, tarfile, zlib, lzma, numpy and Pillow know some twenty kinds between them
    except Exception as error:
        reason = " ".join(str(getattr(error, "strerror", None) or error).split())
        raise UserError(f"{what}: {reason or type(error).__name__}; {repair}") from error


# ------------------------------------------------------------------------------------------------
# metadata

# The chunks of a PNG that say its pixels, and its rotation.
PNG_CHUNKS = (b"IHDR", b"PLTE", b"tRNS", b"eXIf", b"IDAT", b"IEND")


def plain_png(data: bytes) -> bytes:
    """A PNG without what else may be in it, such as texts and colour profiles.

    TRAP: Pillow refuses large ones, and keeps texts under their own names among the values that it
    decodes by: one called "transparency" or "interlace" would decide about pixels.
    """
    chunks, start = [data[:8]], 8
    while start < len(data):
        end = start + 12 + int.from_bytes(data[start:start + 4], "big")
        if data[start + 4:start + 8] in PNG_CHUNKS:
            chunks.append(data[start:end])
        start = end
    return b"".join(chunks)


def orientation(image: Image.Image) -> int:
    """EXIF's number, 1 to 8. Metadata that cannot be read says nothing: 1."""
    try:
        return image.getexif().get(0x112, 1)
    except Exception:
        return 1


# ------------------------------------------------------------------------------------------------
# bytes to pixels

def decode(data: bytes, name: str, repair: str = MEND_IMAGE,
           background: str = "white") -> np.ndarray:
    """The bytes of an image file -> uint8 (H, W, 3). Raises UserError that starts with `name`.

    background   the colour behind what is transparent
    """
    # Pillow's warnings name no file: they are silenced, its errors become one line.
    with explained(name, repair), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        need(len(data) > 0, f"{name}: the file is empty; {repair}")
        if data.startswith(b"\x89PNG\r\n\x1a\n"):
            data = plain_png(data)
        try:
            image = Image.open(io.BytesIO(data), formats=FORMATS)
        except UnidentifiedImageError:
            raise ValueError(kind_of_bytes(data)) from None
        turn = None
        if image.format == "TIFF":  # loading one loses its EXIF, turns the image or fails at that
            turn, image.load_end = orientation(image), lambda: None
        # Decodes every pixel: only that finds all truncated files, Image.verify() passes some.
        image.load()
        turn = turn or orientation(image)
        if turn in TURNS:
            image = image.transpose(TURNS[turn])
        if image.mode == "F":
            raise ValueError("pixels are floating-point numbers of unknown range, "
                             "save it with 8 or 16 bits")
        if image.mode.startswith("I"):  # TRAP: convert("RGB") clips 16 bits to white
            values = np.asarray(image).astype(np.int64)
            if values.min() < 0 or values.max() > 65535:
                raise ValueError("gray values go beyond 16 bits, save it with 8 or 16 bits")
            gray = np.rint(values / 257).astype(np.uint8)  # 65535 = 255 * 257
            return np.repeat(gray[:, :, None], 3, axis=2)
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, background), image)
        return np.asarray(image.convert("RGB"))


def read_image(path: str, background: str = "white") -> np.ndarray:
    """An image file -> uint8 (H, W, 3). Raises UserError that names the file."""
    repair = "give the path of an image file"
    with explained(path, repair), open(path, "rb") as file:
        data = file.read()
    return decode(data, path, repair, background)


# ------------------------------------------------------------------------------------------------
# pixels to what models take, and to a sheet

def resize_crop(image: np.ndarray, size: int, rng: np.random.Generator | None = None) -> np.ndarray:
    """uint8 (H, W, 3) -> uint8 (size, size, 3): the central square, or with `rng` any square.

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
    # Cropping by `box` resizes only what is kept; bicubic filters widen as they shrink (antialias).
    box = (left, top, left + side, top + side)
    cut = Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC, box=box)
    return np.asarray(cut)


def augment(image: np.ndarray, size: int, key: tuple[int, ...], flip: bool,
            random_crop: bool) -> np.ndarray:
    """resize_crop and mirror at random, as a function of `key` = (seed, epoch, index) alone."""
    if not (flip or random_crop):  # making an rng takes longer than all the rest
        return resize_crop(image, size)
    rng = np.random.default_rng(key)
    mirror = rng.random() < 0.5  # drawn in any case, so that flip leaves the crops alone
    image = resize_crop(image, size, rng if random_crop else None)
    return image[:, ::-1] if flip and mirror else image


def to_float(images: Tensor) -> Tensor:
    """uint8 (B, H, W, 3) -> float32 (B, 3, H, W) in [-1, 1]."""
    return images.permute(0, 3, 1, 2).contiguous().float() / 127.5 - 1


def to_uint8(images: Tensor) -> Tensor:
    """float (B, 3, H, W) in [-1, 1] -> uint8 (B, H, W, 3); values outside are clamped."""
    x = (images.float() + 1) * 127.5
    # TRAP: without round, 63 of 256 values change
    return x.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)


def save_grid(images: Tensor | np.ndarray, path: str, columns: int, scale: int = 1) -> None:
    """Write uint8 images (B, H, W, 3) as one PNG. Raises UserError when `path` cannot be written.
    """
    with checkpoint.replacing(path) as file:
        grid_of(images, columns, scale).save(file, format="PNG")


def grid_of(images: Tensor | np.ndarray, columns: int, scale: int = 1) -> Image.Image:
    """uint8 images (B, H, W, 3) as one: row by row, with white margins.

    images  with a fourth channel, opacity, the margins are transparent
    scale   how many times each is enlarged
    """
    images = torch.as_tensor(images).cpu().numpy().repeat(scale, axis=1).repeat(scale, axis=2)
    (B, H, W, channels), margin = images.shape, 2
    rows = math.ceil(B / columns)
    height, width = margin + rows * (H + margin), margin + columns * (W + margin)
    sheet = np.full((height, width, channels), 255, np.uint8)
    sheet[..., 3:] = 0
    for k, image in enumerate(images):
        y, x = margin + k // columns * (H + margin), margin + k % columns * (W + margin)
        sheet[y:y + H, x:x + W] = image
    return Image.fromarray(sheet)


if __name__ == "__main__":
    # each byte once
    values = torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1).expand(1, 16, 16, 3)
    x = to_float(values)
    truncated = ((x + 1) * 127.5).to(torch.uint8).permute(0, 2, 3, 1)
    for way, result in (("rounded", to_uint8(x)), ("truncated", truncated)):
        print(f"{way:10} {(result != values)[..., 0].sum():3} of 256 values come back changed")
    print("Only round() was left out, and no eye sees it in a picture.")
    print("Would you see it in a PSNR, or in a FID?")
