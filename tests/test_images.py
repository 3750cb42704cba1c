"""images.py: which images are read, what is refused and how, and that pixels keep their values."""
import os
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, TiffImagePlugin, TiffTags

from helpers import RED, encoded, noise, put, refused
from plumbing import datasets
from plumbing.images import augment, decode, read_image, resize_crop, save_grid, to_float, to_uint8


def chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def png(header: bytes, rows: bytes) -> bytes:
    """A PNG written by hand, for what Pillow does not write."""
    chunks = chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


# ------------------------------------------------------------------------------------------------
# what loads and what does not

def full(mode, colour):
    return Image.new(mode, (6, 4), colour)


def transparent_palette():
    image = full("P", 1)
    image.putpalette([0, 0, 0, *RED])
    image.putpixel((0, 0), 0)
    return encoded(image, "PNG", transparency=0)  # colour 0 is transparent


LOADS = {  # name: (bytes, colour of the last pixel)
    "gray.png": (encoded(full("L", 77), "PNG"), (77, 77, 77)),
    "bilevel.png": (encoded(full("1", 1), "PNG"), (255, 255, 255)),
    "gray-alpha.png": (encoded(full("LA", (0, 0)), "PNG"), (255, 255, 255)),
    "palette.png": (encoded(Image.new("RGB", (6, 4), RED).quantize(), "PNG"), RED),
    "palette-transparent.png": (transparent_palette(), RED),
    "cmyk.tif": (encoded(full("CMYK", (0, 255, 255, 0)), "TIFF"), (255, 0, 0)),
    "cmyk.jpg": (encoded(full("CMYK", (0, 255, 255, 0)), "JPEG", quality=100), (255, 0, 0)),
    "rgba-clear.png": (encoded(full("RGBA", (*RED, 0)), "PNG"), (255, 255, 255)),
    "rgba-solid.png": (encoded(full("RGBA", (*RED, 255)), "PNG"), RED),
    "rgba-half.png": (encoded(full("RGBA", (0, 100, 255, 51)), "PNG"), (204, 224, 255)),
    "rgb-key.png": (encoded(full("RGB", RED), "PNG", transparency=RED), (255, 255, 255)),
    "rgb16.png": (png(struct.pack(">IIBBBBB", 6, 4, 16, 2, 0, 0, 0),
                      (b"\0" + struct.pack(">HHH", *(257 * c for c in RED)) * 6) * 4), RED),
    "gray16.png": (encoded(Image.fromarray(np.full((4, 6), 32768, np.uint16)), "PNG"),
                   (128, 128, 128)),
    "gray16.tif": (encoded(Image.fromarray(np.full((4, 6), 257, np.uint16)), "TIFF"), (1, 1, 1)),
    "gray32.tif": (encoded(Image.fromarray(np.full((4, 6), 65535, np.int32)), "TIFF"),
                   (255, 255, 255)),
    "lossless.webp": (encoded(full("RGB", RED), "WEBP", lossless=True), RED),
    "two-frames.gif": (encoded(full("RGB", RED), "GIF", save_all=True,
                               append_images=[full("RGB", "blue")]), RED),
    "picture.bmp": (encoded(full("RGB", RED), "BMP"), RED),
    "picture.ppm": (encoded(full("RGB", RED), "PPM"), RED),
    "wrong-ending.jpg": (encoded(full("RGB", RED), "PNG"), RED),
    "LOUD.PNG": (encoded(full("RGB", RED), "PNG"), RED),
    "Фото 写真 é.png": (encoded(full("RGB", RED), "PNG"), RED),
    "damaged-exif.jpg": (encoded(full("RGB", "white"), "JPEG", exif=b"Exif\0\0garbage garbage"),
                         (255, 255, 255)),
    **{f"white.{ending}": (encoded(full("L" if ending == "pgm" else "RGB", "white"), kind),
                           (255, 255, 255))
       for ending, kind in [("jfif", "JPEG"), ("jpe", "JPEG"), ("JFIF", "JPEG"), ("avif", "AVIF"),
                            ("pgm", "PPM"), ("pnm", "PPM"), ("apng", "PNG"), ("dib", "DIB"),
                            ("jp2", "JPEG2000"), ("tga", "TGA"), ("qoi", "QOI"), ("pcx", "PCX"),
                            ("sgi", "SGI")]},
}


@pytest.mark.parametrize("name", LOADS)
def test_every_usual_kind_of_image_loads_with_its_colour(tmp_path, name):
    content, colour = LOADS[name]
    put(tmp_path / name, content)
    image = datasets.open_images(str(tmp_path)).load(0)
    assert image.shape == (4, 6, 3) and image.dtype == np.uint8
    tolerance = 2 if name.endswith(".jpg") else 0  # of lossy compression
    assert np.abs(image[-1, -1].astype(int) - colour).max() <= tolerance


def test_transparent_palette_colours_become_white():
    assert tuple(decode(transparent_palette(), "x")[0, 0]) == (255, 255, 255)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_exif_rotation_is_applied(kind):
    image = Image.new("RGB", (40, 20), "white")
    image.paste("black", (0, 0, 20, 20))  # stored: black on the left
    exif = Image.Exif()
    exif[0x112] = 6  # to be seen turned right by 90 degrees: black on top
    seen = decode(encoded(image, kind, exif=exif), "x")
    assert seen.shape == (40, 20, 3) and seen[5].max() < 50 and seen[35].min() > 200


# ------------------------------------------------------------------------------------------------
# metadata never decides about pixels

def with_chunk(name: bytes, body: bytes, place: int = 33) -> bytes:
    """A PNG with one more chunk behind its header."""
    whole = encoded(full("RGB", RED), "PNG")
    return whole[:place] + chunk(name, body) + whole[place:]


def tiff_with_xmp_of_numbers() -> bytes:
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    tags[700], tags.tagtype[700] = (1, 2, 3), TiffTags.SHORT
    return encoded(full("RGB", RED), "TIFF", tiffinfo=tags)


ODD = {
    "a profile of 2 MB": with_chunk(b"iCCP", b"icc\0\0" + zlib.compress(bytes(2 << 20))),
    "2 MB of text": with_chunk(b"zTXt", b"parameters\0\0" + zlib.compress(b"a" * (2 << 20))),
    "a profile that does not unpack": with_chunk(b"iCCP", b"icc\0\0garbage"),
    "half a resolution": with_chunk(b"pHYs", b"\0\0"),
    "half a gamma": with_chunk(b"gAMA", b"\0"),
    **{f"a text called {name}": with_chunk(b"tEXt", name.encode() + b"\0none")
       for name in ("exif", "xmp", "transparency", "interlace", "icc_profile", "gamma", "dpi",
                    "default_image", "bbox", "Raw profile type exif", "XML:com.adobe.xmp")},
    "a raw profile of letters": with_chunk(b"tEXt", b"Raw profile type exif\0\nexif\n 8\nzz"),
    "an animation of no frames": with_chunk(b"acTL", bytes(8)),
    "EXIF of zeros": encoded(full("RGB", RED), "WEBP", exif=bytes(16), lossless=True),
    "EXIF of letters": encoded(full("RGB", RED), "WEBP", exif=b"Exif\0\0garb", lossless=True),
    "XMP of numbers": tiff_with_xmp_of_numbers(),
}


@pytest.mark.parametrize("what", ODD)
def test_odd_metadata_neither_refuses_nor_changes_a_picture(what, recwarn, capfd):
    assert np.array_equal(decode(ODD[what], "x"), np.full((4, 6, 3), RED))
    assert not recwarn.list and capfd.readouterr().err == ""


def test_a_rotation_is_found_behind_metadata_that_is_too_large():
    image = Image.new("RGB", (40, 20), "white")
    exif = Image.Exif()
    exif[0x112] = 6
    whole = encoded(image, "PNG", exif=exif)
    large = chunk(b"zTXt", b"parameters\0\0" + zlib.compress(b"a" * (2 << 20)))
    assert decode(whole[:33] + large + whole[33:], "x").shape == (40, 20, 3)


def test_a_warning_of_the_library_never_reaches_the_terminal(recwarn, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20)  # 24 of them: Pillow warns
    assert decode(encoded(full("RGB", RED), "PNG"), "x").shape == (4, 6, 3)
    assert not recwarn.list


# ------------------------------------------------------------------------------------------------
# what is refused

WHOLE = Image.fromarray(noise(1, 60, 80))
BROKEN = {
    **{f"half.{kind.lower()}": encoded(WHOLE, kind)[:len(encoded(WHOLE, kind)) // 2]
       for kind in ("JPEG", "PNG", "BMP", "GIF", "WEBP", "TIFF", "PPM")},
    "last-bytes-missing.jpg": encoded(WHOLE, "JPEG")[:-2],
    "flipped-bit.png": bytes(b ^ (k == 200) for k, b in enumerate(encoded(WHOLE, "PNG"))),
    "empty.png": b"",
    "page.jpg": b"<!DOCTYPE html><html>404 not found</html>",
    "text.png": b"hello\nworld\n",
    "script.jpg": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
    "float.tif": encoded(Image.fromarray(np.ones((4, 6), np.float32)), "TIFF"),
    "gray32.tif": encoded(Image.fromarray(np.full((4, 6), 70000, np.int32)), "TIFF"),
    "bomb.png": png(struct.pack(">IIBBBBB", 40000, 40000, 8, 2, 0, 0, 0), b""),
}
REASONS = {"half.jpeg": "truncated", "empty.png": "empty", "script.jpg": "PostScript",
           "page.jpg": "HTML page", "float.tif": "floating-point", "gray32.tif": "16 bits",
           "bomb.png": "decompression bomb"}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_image_is_refused_with_its_name_a_reason_and_a_repair(tmp_path, name):
    path = put(tmp_path / "cat" / name, BROKEN[name])
    load = datasets.open_images(str(tmp_path)).load
    message = refused(load, 0, names=[path, REASONS.get(name, ""), "replace or remove it"])
    # Whoever asked for one image has no data set to mend, and not every program has that flag.
    assert "skip_bad" not in message
    message = refused(read_image, path, names=[path, "give the path of an image"])
    assert "remove it" not in message and "skip_bad" not in message


@pytest.mark.parametrize("what, content", [
    ("HEIC", b"\0\0\0\x18ftypheic\0\0\0\0mif1heic"), ("PDF", b"%PDF-1.7\n"),
    ("AVIF", b"\0\0\0\x1cftypavif" + bytes(20)), ("zip", b"PK\3\4" + bytes(30)),
    ("HTML page", b"\xef\xbb\xbf\n<!-- no -->\n<HTML><body>404"),
    ("'Access denied'", b"Access denied\n"), ("Git LFS", b"version https://git-lfs.github.com/spec"),
    ("torn JPEG", b"\xff\xd8\xff\xe0"),
    ("begins with b'\\x01\\xfe", b"\1\xfe\2\xfd\3")])
def test_what_is_no_picture_is_called_by_what_it_is(what, content):
    message = refused(decode, content, "photo.jpg", names=["photo.jpg: ", what, "replace or"])
    if what in ("HEIC", "PDF", "HTML page", "zip", "Git LFS"):
        assert "torn" not in message, "nobody should copy it again"


def test_a_folder_or_a_missing_file_is_no_image_and_says_so(tmp_path):
    for path in (tmp_path, tmp_path / "gone.jpg"):
        refused(read_image, str(path), names=[str(path), "give the path of an image file"])


# ------------------------------------------------------------------------------------------------
# cropping, mirroring, floats, sheets

@pytest.mark.parametrize("rng", [None, np.random.default_rng(0)])
def test_any_shape_becomes_a_square(rng):
    for height, width in ((1, 1), (10, 2000), (2000, 10), (32, 47), (33, 32)):
        assert resize_crop(noise(0, height, width), 32, rng).shape == (32, 32, 3)


def test_the_centre_crop_of_an_image_of_the_right_height_is_its_middle():
    image = noise(0, 32, 48)
    assert np.array_equal(resize_crop(image, 32), image[:, 8:40])


def test_shrinking_averages_instead_of_picking_pixels():
    checkers = np.indices((64, 64)).sum(0)[..., None].repeat(3, 2) % 2 * 255
    inner = resize_crop(checkers.astype(np.uint8), 16)[2:-2, 2:-2].astype(int)
    assert abs(inner - 127).max() < 20


def test_random_crops_differ_and_follow_from_the_key_alone():
    image = noise(0, 64, 48)
    crops = [augment(image, 32, (0, 0, k), False, True) for k in range(8)]
    assert len({crop.tobytes() for crop in crops}) == 8
    assert np.array_equal(crops[5], augment(image, 32, (0, 0, 5), False, True))


def test_flip_mirrors_about_half_of_the_images():
    image = noise(0, 32, 32)
    results = [augment(image, 32, (0, 0, k), True, False) for k in range(400)]
    mirrored = sum(np.array_equal(result, image[:, ::-1]) for result in results)
    assert 150 < mirrored < 250
    assert sum(np.array_equal(result, image) for result in results) == 400 - mirrored


def test_all_256_values_survive_the_way_to_float_and_back_each_in_its_place():
    images = torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1).repeat(1, 1, 1, 3)
    x = to_float(images)
    assert x.shape == (1, 3, 16, 16) and x.dtype == torch.float32 and x.min() == -1 and x.max() == 1
    assert torch.equal(to_uint8(x), images)
    images = torch.from_numpy(noise(0)[None])
    assert torch.equal(to_uint8(to_float(images)), images)
    outside = torch.tensor([-9.0, 9.0, 0.0]).view(1, 3, 1, 1)
    assert to_uint8(outside).flatten().tolist() == [0, 255, 128]


def test_a_grid_shows_each_image_enlarged_between_white_margins(tmp_path):
    images = np.stack([noise(k, 4, 5) for k in range(3)])
    save_grid(torch.from_numpy(images), str(tmp_path / "grid.png"), columns=2, scale=3)
    sheet = read_image(str(tmp_path / "grid.png"))
    assert sheet.shape == (2 + 2 * (12 + 2), 2 + 2 * (15 + 2), 3)
    assert np.array_equal(sheet[2:14:3, 19:34:3], images[1])
    assert np.array_equal(sheet[18:28:3, 4:17:3], images[2])
    assert (sheet[:2] == 255).all() and (sheet[14:16] == 255).all()
    assert (sheet[:, 17:19] == 255).all()
    assert os.listdir(tmp_path) == ["grid.png"]


def test_a_grid_that_cannot_be_written_is_a_user_error_and_leaves_nothing(tmp_path):
    (tmp_path / "taken.png").mkdir()
    for path in (tmp_path / "taken.png", tmp_path / "gone" / "a.png"):
        refused(save_grid, noise(0)[None], str(path), 1, names=[path.name])
    assert os.listdir(tmp_path) == ["taken.png"]
