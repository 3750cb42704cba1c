"""One image: from the bytes of a file to a square of pixels, to the models' floats and back, and onto a sheet.

In       the bytes of a JPEG, PNG, BMP, GIF, WebP, TIFF or PPM file
Out      decode       uint8 (H, W, 3)
         resize_crop  uint8 (S, S, 3), augment the same with a random crop and mirror
         to_float     float32 (B, 3, S, S) in [-1, 1], what the models take; to_uint8 is the way back
Differs  the paper leaves these open: transparent images are put on white, 16-bit gray is scaled to 8 bits,
         EXIF rotation is applied. Whatever cannot be decoded to its last pixel is refused by name.
Try      python -m plumbing.images      (rounds and truncates all 256 values; only one of the two brings them back)
"""
import contextlib
import io
import math

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from plumbing import checkpoint
from plumbing.flags import UserError, need

ENDINGS = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm")
# no others: Pillow would run Ghostscript for an EPS
FORMATS = ("JPEG", "PNG", "BMP", "GIF", "WEBP", "TIFF", "PPM")
MEND_IMAGE = "replace or remove it (train.py --skip_bad passes over up to 1% of bad ones)"


@contextlib.contextmanager
def explained(what: str, repair: str):
    """Whatever the libraries raise inside becomes one UserError in one line: what, the reason, the repair."""
    try:
        yield
    except UserError:
        raise
    # zipfile, tarfile, zlib, lzma, numpy and Pillow know some twenty kinds between them
    except Exception as error:
        reason = " ".join(str(getattr(error, "strerror", None) or error).split()) or type(error).__name__
        raise UserError(f"{what}: {reason}; {repair}") from error


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
        if image.mode.startswith("I"):  # TRAP: convert("RGB") clips 16 bits to white
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
    """Write uint8 images (B, H, W, 3), each enlarged `scale` times, row by row with white margins, as one PNG.

    Raises UserError when `path` cannot be written.
    """
    images = torch.as_tensor(images).cpu().numpy().repeat(scale, axis=1).repeat(scale, axis=2)
    (B, H, W, _), margin = images.shape, 2
    rows = math.ceil(B / columns)
    sheet = np.full((margin + rows * (H + margin), margin + columns * (W + margin), 3), 255, np.uint8)
    for k, image in enumerate(images):
        y, x = margin + k // columns * (H + margin), margin + k % columns * (W + margin)
        sheet[y:y + H, x:x + W] = image
    with checkpoint.replacing(path) as file:
        Image.fromarray(sheet).save(file, format="PNG")


if __name__ == "__main__":
    # each byte once
    values = torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1).expand(1, 16, 16, 3)
    x = to_float(values)
    truncated = ((x + 1) * 127.5).to(torch.uint8).permute(0, 2, 3, 1)
    for way, result in (("rounded", to_uint8(x)), ("truncated", truncated)):
        print(f"{way:10} {(result != values)[..., 0].sum():3} of 256 values come back changed")
    print("Only round() was left out, and no eye sees it in a picture. Would you see it in a PSNR, or in a FID?")
