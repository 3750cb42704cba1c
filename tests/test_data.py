"""data.py: what may be fed in, what is refused and how, and that nothing disturbs the order of the batches."""
import hashlib
import io
import itertools
import multiprocessing
import os
import pickle
import shutil
import struct
import subprocess
import sys
import tarfile
import zipfile
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

import data
from config import UserError

RED = (200, 30, 60)


def noise(seed: int, height: int = 20, width: int = 30) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def png(header: bytes, rows: bytes) -> bytes:
    """A PNG written by hand, for what Pillow does not write."""
    def chunk(name, body):
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def put(path, content: bytes) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return str(path)


def folder_of(root, n: int, classes=("cat", "dog"), size: int = 8):
    """n lossless images, dealt to the classes in turn."""
    for k in range(n):
        put(root / classes[k % len(classes)] / f"{k:03}.png", encoded(Image.fromarray(noise(k, size, size)), "PNG"))
    return root


def packed(root, path, prefix: str) -> str:
    """The folder as the archive that `path` ends in."""
    files = sorted(p for p in root.rglob("*") if p.is_file())
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for file in files:
                archive.write(file, prefix + str(file.relative_to(root)))
    else:
        kind = {".tar": "w", ".gz": "w:gz", ".tgz": "w:gz", ".xz": "w:xz"}[path.suffix]
        with tarfile.open(path, kind) as archive:
            for file in reversed(files):                      # the order inside an archive must not matter
                archive.add(file, prefix + str(file.relative_to(root)))
    return str(path)


def refused(call, *arguments, names=()) -> str:
    """The one line of the UserError that the call must raise; it must contain `names`."""
    with pytest.raises(UserError) as caught:
        result = call(*arguments)
        if hasattr(result, "__next__"):
            for _ in range(1000):
                next(result)
    message = str(caught.value)
    assert "\n" not in message and "object at 0x" not in message
    for name in names:
        assert name in message, message
    return message


def take(stream, n: int):
    return [(images.clone(), labels.clone()) for images, labels in itertools.islice(iter(stream), n)]


def same(a, b) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for pair in zip(a, b) for x, y in zip(*pair))


# ------------------------------------------------------------------------------------------------
# one image

def full(mode, colour):
    return Image.new(mode, (6, 4), colour)


def transparent_palette():
    image = full("P", 1)
    image.putpalette([0, 0, 0, *RED])
    image.putpixel((0, 0), 0)
    return encoded(image, "PNG", transparency=0)              # colour 0 is transparent


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
    "gray16.png": (encoded(Image.fromarray(np.full((4, 6), 32768, np.uint16)), "PNG"), (128, 128, 128)),
    "gray16.tif": (encoded(Image.fromarray(np.full((4, 6), 257, np.uint16)), "TIFF"), (1, 1, 1)),
    "gray32.tif": (encoded(Image.fromarray(np.full((4, 6), 65535, np.int32)), "TIFF"), (255, 255, 255)),
    "lossless.webp": (encoded(full("RGB", RED), "WEBP", lossless=True), RED),
    "two-frames.gif": (encoded(full("RGB", RED), "GIF", save_all=True, append_images=[full("RGB", "blue")]), RED),
    "picture.bmp": (encoded(full("RGB", RED), "BMP"), RED),
    "picture.ppm": (encoded(full("RGB", RED), "PPM"), RED),
    "wrong-ending.jpg": (encoded(full("RGB", RED), "PNG"), RED),
    "LOUD.PNG": (encoded(full("RGB", RED), "PNG"), RED),
    "Фото 写真 é.png": (encoded(full("RGB", RED), "PNG"), RED),
    "damaged-exif.jpg": (encoded(full("RGB", "white"), "JPEG", exif=b"Exif\0\0garbage garbage"), (255, 255, 255)),
}


@pytest.mark.parametrize("name", LOADS)
def test_every_usual_kind_of_image_loads_with_its_colour(tmp_path, name):
    content, colour = LOADS[name]
    put(tmp_path / name, content)
    image = data.open_images(str(tmp_path)).load(0)
    assert image.shape == (4, 6, 3) and image.dtype == np.uint8
    tolerance = 2 if name.endswith(".jpg") else 0             # of lossy compression
    assert np.abs(image[-1, -1].astype(int) - colour).max() <= tolerance


def test_transparent_palette_colours_become_white():
    assert tuple(data.decode(transparent_palette(), "x")[0, 0]) == (255, 255, 255)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_exif_rotation_is_applied(kind):
    image = Image.new("RGB", (40, 20), "white")
    image.paste("black", (0, 0, 20, 20))                      # stored: black on the left
    exif = Image.Exif()
    exif[0x112] = 6                                           # to be seen turned right by 90 degrees: black on top
    seen = data.decode(encoded(image, kind, exif=exif), "x")
    assert seen.shape == (40, 20, 3) and seen[5].max() < 50 and seen[35].min() > 200


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
REASONS = {"half.jpeg": "truncated", "empty.png": "empty", "script.jpg": "not an image", "page.jpg": "<!DOCTYPE",
           "float.tif": "floating-point", "gray32.tif": "16 bits", "bomb.png": "decompression bomb"}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_image_is_refused_with_its_name_a_reason_and_a_repair(tmp_path, name):
    path = put(tmp_path / "cat" / name, BROKEN[name])
    refused(data.open_images(str(tmp_path)).load, 0, names=[path, REASONS.get(name, ""), "replace or remove it"])
    refused(data.read_image, path, names=[path])


@pytest.mark.parametrize("height, width", [(1, 1), (10, 2000), (2000, 10), (32, 47), (33, 32)])
@pytest.mark.parametrize("rng", [None, np.random.default_rng(0)])
def test_any_shape_becomes_a_square(height, width, rng):
    assert data.resize_crop(noise(0, height, width), 32, rng).shape == (32, 32, 3)


def test_the_centre_crop_of_an_image_of_the_right_height_is_its_middle():
    image = noise(0, 32, 48)
    assert np.array_equal(data.resize_crop(image, 32), image[:, 8:40])
    assert np.array_equal(data.resize_crop(image[:, :32], 32), image[:, :32])


def test_shrinking_averages_instead_of_picking_pixels():
    checkers = np.indices((64, 64)).sum(0)[..., None].repeat(3, 2) % 2 * 255
    inner = data.resize_crop(checkers.astype(np.uint8), 16)[2:-2, 2:-2].astype(int)
    assert abs(inner - 127).max() < 20


def test_random_crops_differ_and_follow_from_the_key_alone():
    image = noise(0, 64, 48)
    crops = [data.augment(image, 32, (0, 0, k), False, True) for k in range(8)]
    assert len({crop.tobytes() for crop in crops}) == 8
    assert np.array_equal(crops[5], data.augment(image, 32, (0, 0, 5), False, True))


def test_flip_mirrors_about_half_of_the_images():
    image = noise(0, 32, 32)
    results = [data.augment(image, 32, (0, 0, k), True, False) for k in range(400)]
    mirrored = sum(np.array_equal(result, image[:, ::-1]) for result in results)
    assert 150 < mirrored < 250
    assert sum(np.array_equal(result, image) for result in results) == 400 - mirrored


def test_all_256_values_survive_the_way_to_float_and_back():
    images = torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1).repeat(1, 1, 1, 3)
    x = data.to_float(images)
    assert x.shape == (1, 3, 16, 16) and x.dtype == torch.float32 and x.min() == -1 and x.max() == 1
    assert torch.equal(data.to_uint8(x), images)


def test_channels_keep_their_place_and_values_outside_are_clamped():
    images = torch.from_numpy(noise(0)[None])
    assert torch.equal(data.to_uint8(data.to_float(images)), images)
    assert data.to_uint8(torch.tensor([-9.0, 9.0, 0.0]).view(1, 3, 1, 1)).flatten().tolist() == [0, 255, 128]


def test_a_grid_shows_each_image_enlarged_between_white_margins(tmp_path):
    images = np.stack([noise(k, 4, 5) for k in range(3)])
    data.save_grid(torch.from_numpy(images), str(tmp_path / "grid.png"), columns=2, scale=3)
    sheet = data.read_image(str(tmp_path / "grid.png"))
    assert sheet.shape == (2 + 2 * (12 + 2), 2 + 2 * (15 + 2), 3)
    assert np.array_equal(sheet[2:14:3, 19:34:3], images[1]) and np.array_equal(sheet[18:28:3, 4:17:3], images[2])
    assert (sheet[:2] == 255).all() and (sheet[14:16] == 255).all() and (sheet[:, 17:19] == 255).all()
    assert os.listdir(tmp_path) == ["grid.png"]


def test_a_grid_that_cannot_be_written_is_a_user_error_and_leaves_nothing(tmp_path):
    (tmp_path / "taken.png").mkdir()
    refused(data.save_grid, noise(0)[None], str(tmp_path / "taken.png"), 1, names=["taken.png"])
    refused(data.save_grid, noise(0)[None], str(tmp_path / "gone" / "a.png"), 1, names=["a.png"])
    assert os.listdir(tmp_path) == ["taken.png"]


# ------------------------------------------------------------------------------------------------
# folders

def test_class_folders_become_labels_in_sorted_order(tmp_path):
    dataset = data.open_images(str(folder_of(tmp_path / "pets", 6, ("dog", "ant", "cat"))))
    assert dataset.name == "pets" and dataset.classes == ["ant", "cat", "dog"]
    assert dataset.labels.dtype == np.int64 and dataset.labels.tolist() == [0, 0, 1, 1, 2, 2] and len(dataset) == 6
    assert np.array_equal(dataset.load(0), noise(1, 8, 8)) and np.array_equal(dataset.load(5), noise(3, 8, 8))


def test_a_flat_folder_is_one_class_and_other_files_do_not_count(tmp_path):
    for name in ("b.png", "a.PNG"):
        put(tmp_path / name, LOADS["LOUD.PNG"][0])
    put(tmp_path / "README.txt", b"words")
    put(tmp_path / "labels.csv", b"1,2")
    (tmp_path / "folder.png").mkdir()
    dataset = data.open_images(str(tmp_path))
    assert dataset.classes == ["all"] and dataset.labels.tolist() == [0, 0]


@pytest.mark.parametrize("form", ["folder", "x.tar", "x.zip"])
def test_hidden_files_are_skipped(tmp_path, form):
    root = folder_of(tmp_path / "set", 4)
    for name in (".hidden/1.png", "cat/._000.png", "cat/.ipynb_checkpoints/000.png", "__MACOSX/cat/._000.png"):
        put(root / name, b"not an image")
    path = str(root) if form == "folder" else packed(root, tmp_path / form, "")
    dataset = data.open_images(path)
    assert dataset.classes == ["cat", "dog"] and len(dataset) == 4


def test_a_folder_named_like_an_image_is_no_image(tmp_path):
    root = folder_of(tmp_path / "set", 4)
    (root / "cat" / "x.jpg").mkdir()
    assert len(data.open_images(str(root))) == 4


def test_folders_above_the_classes_are_ignored_when_all_images_share_them(tmp_path):
    inner = folder_of(tmp_path / "outer" / "train", 4)
    outer, direct = data.open_images(str(tmp_path / "outer")), data.open_images(str(inner))
    assert outer.classes == direct.classes == ["cat", "dog"] and outer.fingerprint == direct.fingerprint


def test_user_errors_of_folders(tmp_path):
    refused(data.open_images, str(tmp_path / "gone"), names=["gone", "no such"])
    refused(data.open_images, put(tmp_path / "a.rar", b"x"), names=["a.rar", ".tar"])
    (tmp_path / "empty").mkdir()
    refused(data.open_images, str(tmp_path / "empty"), names=["empty", ".jpeg"])
    root = folder_of(tmp_path / "set", 4)
    (root / "cow").mkdir()
    refused(data.open_images, str(root), names=["cow", "no images"])
    (root / "cow").rmdir()
    put(root / "top.png", b"")
    refused(data.open_images, str(root), names=["top.png", "dog/003.png"])


def test_train_and_test_side_by_side_are_refused_with_advice(tmp_path):
    for part in ("train", "test"):
        folder_of(tmp_path / part, 4)
    refused(data.open_images, str(tmp_path), names=["train/dog", "test/cat", "give the folder"])


def test_links_work_unless_they_dangle_or_lead_back(tmp_path):
    root = folder_of(tmp_path / "set", 4)
    (root / "dog" / "link.png").symlink_to(root / "cat" / "000.png")
    assert len(data.open_images(str(root))) == 5
    (root / "dog" / "dangling.png").symlink_to(root / "gone.png")
    refused(data.open_images, str(root), names=["dangling.png", "link"])
    (root / "dog" / "dangling.png").unlink()
    (root / "dog" / "loop").symlink_to(root)
    refused(data.open_images, str(root), names=["link"])


def test_the_fingerprint_follows_content_not_place(tmp_path):
    root = folder_of(tmp_path / "set", 4)
    before = data.open_images(str(root)).fingerprint
    shutil.copytree(root, tmp_path / "moved" / "copy")
    assert data.open_images(str(tmp_path / "moved" / "copy")).fingerprint == before
    put(root / "cat" / "new.png", LOADS["LOUD.PNG"][0])
    assert data.open_images(str(root)).fingerprint != before
    assert int(before, 16) >= 0


# ------------------------------------------------------------------------------------------------
# archives

@pytest.mark.parametrize("prefix", ["", "./", "cifar/train/"])
@pytest.mark.parametrize("ending", [".tar", ".zip", ".tar.gz", ".tgz", ".tar.xz"])
def test_an_archive_equals_its_folder_bit_for_bit(tmp_path, ending, prefix):
    root = folder_of(tmp_path / "set", 5)
    folder = data.open_images(str(root))
    archive = data.open_images(packed(root, tmp_path / ("x" + ending), prefix), cache=str(tmp_path / "cache"))
    assert archive.classes == folder.classes and archive.fingerprint == folder.fingerprint
    assert archive.labels.tolist() == folder.labels.tolist()
    copy = pickle.loads(pickle.dumps(archive))
    for i in range(5):
        assert np.array_equal(archive.load(i), folder.load(i)) and np.array_equal(copy.load(i), folder.load(i))


def test_reading_an_archive_in_place_writes_nothing(tmp_path):
    root = folder_of(tmp_path / "set", 4)
    packed(root, tmp_path / "x.tar", "../../climbs/out/")
    packed(root, tmp_path / "x.zip", "deep/")
    before = sorted(tmp_path.rglob("*"))
    data.open_images(str(tmp_path / "x.zip")).load(0)
    refused(data.open_images, str(tmp_path / "x.tar"), names=["x.tar"])       # .. counts as hidden
    assert sorted(tmp_path.rglob("*")) == before


def test_a_compressed_tar_is_unpacked_once_and_again_when_it_changes(tmp_path, capsys):
    root, cache = folder_of(tmp_path / "set", 4), tmp_path / "run" / "cache"
    path = packed(root, tmp_path / "x.tar.gz", "")
    data.open_images(path, str(cache))
    assert "unpacking" in capsys.readouterr().err and len(os.listdir(cache)) == 1
    assert len(data.open_images(path, str(cache))) == 4 and capsys.readouterr().err == ""
    folder_of(root, 6)
    packed(root, tmp_path / "x.tar.gz", "")
    assert len(data.open_images(path, str(cache))) == 6


@pytest.mark.parametrize("ending", [".tar.gz", ".tar.xz", ".zip", ".tar"])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.6, 0.95])
def test_a_torn_archive_is_refused_and_leaves_nothing(tmp_path, ending, share):
    root, path = folder_of(tmp_path / "set", 40), tmp_path / ("x" + ending)
    packed(root, path, "")
    whole = path.read_bytes()
    if ending == ".tar":
        whole = whole.rstrip(b"\0")                           # up to 10 kB of zeros follow the end
    path.write_bytes(whole[:int(share * len(whole))])
    (tmp_path / "cache").mkdir()
    refused(data.open_images, str(path), str(tmp_path / "cache"), names=[path.name])
    assert os.listdir(tmp_path / "cache") == []


def test_a_tar_torn_between_two_images_is_refused(tmp_path):
    path = tmp_path / "x.tar"
    packed(folder_of(tmp_path / "set", 4), path, "")
    with tarfile.open(path) as archive:
        third = archive.getmembers()[2].offset
    whole = path.read_bytes()
    path.write_bytes(whole[:third])
    refused(data.open_images, str(path), names=["x.tar", "torn"])
    path.write_bytes(bytes(b ^ (k == third + 20) for k, b in enumerate(whole)))       # a damaged header
    refused(data.open_images, str(path), names=["x.tar", "torn"])


def test_a_damaged_image_in_an_archive_is_named(tmp_path):
    path = tmp_path / "x.zip"
    packed(folder_of(tmp_path / "set", 4), path, "")
    damaged = bytearray(path.read_bytes())
    damaged[120] ^= 1                                         # inside the first image
    path.write_bytes(damaged)
    refused(data.open_images(str(path)).load, 0, names=["x.zip", "cat/000.png"])


def test_a_link_in_a_tar_is_refused_with_advice(tmp_path):
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w") as archive:
        link = tarfile.TarInfo("cat/1.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    refused(data.open_images, str(path), names=["cat/1.png", "--dereference"])


# ------------------------------------------------------------------------------------------------
# arrays

def test_an_npz_gives_its_images_labels_and_names(tmp_path):
    x, path = np.stack([noise(k, 6, 7) for k in range(5)]), str(tmp_path / "a.npz")
    np.savez(path, x=x, y=np.array([0, 2, 1, 0, 2]))
    dataset = data.open_images(path)
    assert dataset.classes == ["0", "1", "2"] and dataset.labels.tolist() == [0, 2, 1, 0, 2]
    assert np.array_equal(pickle.loads(pickle.dumps(dataset)).load(3), x[3])
    np.savez_compressed(path, x=x, y=np.array([0, 1, 1, 0, 1], np.uint8), classes=["cat", "dog", "emu"])
    assert data.open_images(path).classes == ["cat", "dog", "emu"]
    assert data.open_images(path).fingerprint != dataset.fingerprint
    np.savez(path, x=x)
    assert data.open_images(path).classes == ["all"]


class Evil:
    def __reduce__(self):
        return os.mkdir, ("pickle-was-run",)


def test_pickles_never_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.savez("a.npz", x=noise(0)[None], y=np.array([Evil()], dtype=object))
    refused(data.open_images, "a.npz", names=["a.npz", "pickle"])
    with open("b.npz", "wb") as file:
        pickle.dump(Evil(), file)
    refused(data.open_images, "b.npz", names=["b.npz"])
    assert not os.path.exists("pickle-was-run")


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_a_torn_or_flipped_npz_is_refused(tmp_path, save):
    path = tmp_path / "a.npz"
    save(path, x=np.stack([noise(0)] * 3), y=np.arange(3))
    whole = path.read_bytes()
    for share in (0, 0.5, 0.99):
        path.write_bytes(whole[:int(share * len(whole))])
        refused(data.open_images, str(path), names=["a.npz"])
    for place in range(300, len(whole) - 600, 613):
        path.write_bytes(bytes(b ^ (k == place) for k, b in enumerate(whole)))
        refused(data.open_images, str(path), names=["a.npz"])


@pytest.mark.parametrize("arrays, word", [
    (dict(images=noise(0)[None]), "no array x"), (dict(x=noise(0)), "(n, H, W, 3)"),
    (dict(x=np.zeros((2, 4, 4, 3))), "float64"), (dict(x=np.zeros((2, 4, 4, 1), np.uint8)), "(n, H, W, 3)"),
    (dict(x=np.zeros((0, 4, 4, 3), np.uint8)), "(n, H, W, 3)"), (dict(x=noise(0)[None], y=[0, 1]), "labels"),
    (dict(x=noise(0)[None], y=[-1]), "labels"), (dict(x=noise(0)[None], y=[0.5]), "labels"),
    (dict(x=noise(0)[None], y=[3], classes=["a"]), "label 3")])
def test_an_npz_of_the_wrong_make_is_refused_with_what_was_found(tmp_path, arrays, word):
    path = str(tmp_path / "a.npz")
    np.savez(path, **arrays)
    refused(data.open_images, path, names=["a.npz", word])


# ------------------------------------------------------------------------------------------------
# shapes

def test_shapes_are_the_same_on_every_machine():
    train, val = data.open_images("shapes"), data.open_images("shapes:val")
    h = hashlib.sha256()
    for dataset in (train, val):
        for i in range(0, len(dataset), 100):
            h.update(dataset.load(i).tobytes() + bytes([dataset.labels[i]]))
    assert h.hexdigest()[:16] == "fae5d7f7bfb95254"
    assert (len(train), len(val)) == (data.TOTAL - 2000, 2000) and train.fingerprint != val.fingerprint


def test_no_held_out_shape_is_ever_trained_on_even_mirrored():
    train, val = data.open_images("shapes"), data.open_images("shapes:val")
    seen = {image.tobytes() for i in range(len(train)) for image in (train.load(i), train.load(i)[:, ::-1])}
    held = {val.load(i).tobytes() for i in range(len(val))}
    assert len(seen) == 2 * len(train) and len(held) == len(val)
    assert not seen & held


def test_every_shape_lies_wholly_inside_the_picture():
    for shape, size in itertools.product(range(10), range(3)):
        areas = {int(data.coverage(shape, size, row, column).sum()) for row in range(5) for column in range(5)}
        assert len(areas) == 1                                # cut off anywhere, it would be smaller there


def test_labels_tell_the_shape_and_colours_contrast():
    dataset = data.open_images("shapes")
    assert sorted(set(dataset.labels.tolist())) == list(range(10)) and len(dataset.classes) == 10
    for front, back in itertools.product(data.COLOURS.values(), data.BACKGROUNDS.values()):
        assert np.sqrt(np.mean((np.array(front) - np.array(back)) ** 2)) > 90


def test_shapes_of_any_two_classes_differ_even_out_of_focus():
    for size in range(3):                                     # 8 x 8 pixels must still tell them apart
        small = [data.coverage(shape, size, 2, 2).reshape(8, 4, 8, 4).mean((1, 3)) / 16 for shape in range(10)]
        for a, b in itertools.combinations(small, 2):
            assert np.abs(a - b).sum() > 2                    # the area of two such pixels


# ------------------------------------------------------------------------------------------------
# held-out images

def test_held_out_images_are_set_aside_and_together_they_are_all(tmp_path):
    root = str(folder_of(tmp_path / "set", 40))
    train, val = data.train_and_val(root, "", 1000, 3)
    assert (len(train), len(val)) == (36, 4)                  # at most a tenth
    whole = data.open_images(root)
    images = [part.load(i).tobytes() for part in (train, val) for i in range(len(part))]
    assert sorted(images) == sorted(whole.load(i).tobytes() for i in range(40))
    again, _ = data.train_and_val(root, "", 1000, 3)
    other, _ = data.train_and_val(root, "", 1000, 4)
    assert again.fingerprint == train.fingerprint != other.fingerprint != whole.fingerprint
    assert all(np.array_equal(again.load(i), train.load(i)) and again.labels[i] == train.labels[i] for i in range(36))
    assert len(data.train_and_val(root, "", 2, 3)[1]) == 2


def test_tiny_data_sets_still_have_a_held_out_image(tmp_path, capsys):
    train, val = data.train_and_val(str(folder_of(tmp_path / "two", 2)), "", 1000, 0)
    assert (len(train), len(val)) == (1, 1) and not np.array_equal(train.load(0), val.load(0))
    train, val = data.train_and_val(str(folder_of(tmp_path / "one", 1)), "", 1000, 0)
    assert np.array_equal(train.load(0), val.load(0)) and "single image" in capsys.readouterr().out


def test_given_held_out_images_must_have_the_same_classes_or_none(tmp_path):
    root = str(folder_of(tmp_path / "set", 4))
    assert len(data.train_and_val(root, str(folder_of(tmp_path / "same", 2)), 0, 0)[1]) == 2
    flat = put(tmp_path / "flat" / "a.png", LOADS["LOUD.PNG"][0])
    assert data.train_and_val(root, os.path.dirname(flat), 0, 0)[1].classes == ["all"]
    other = str(folder_of(tmp_path / "other", 2, ("cat", "emu")))
    refused(data.train_and_val, root, other, 0, 0, names=["missing: dog", "extra: emu"])
    assert [len(part) for part in data.train_and_val("shapes", "", 5, 0)] == [data.TOTAL - 2000, 2000]


# ------------------------------------------------------------------------------------------------
# the stream

@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """23 images of 12 x 12 in a zip, of which every process opens its own handle."""
    root = tmp_path_factory.mktemp("stream")
    return data.open_images(packed(folder_of(root / "set", 23, size=12), root / "x.zip", ""))


def stream(dataset, **options):
    defaults = dict(image_size=8, batch_size=6, seed=5, flip=True, random_crop=True)
    return data.ImageStream(dataset, **{**defaults, **options})


def test_the_stream_is_the_same_with_and_without_workers(small):
    plain = take(stream(small), 9)                            # more than two epochs
    assert plain[0][0].shape == (6, 8, 8, 3) and plain[0][0].dtype == torch.uint8 and plain[0][1].dtype == torch.int64
    assert same(plain, take(stream(small, workers=2), 9))
    assert not same(plain, take(stream(small, seed=6), 9))


def test_the_stream_is_the_same_for_one_and_two_and_three_ranks(small):
    plain = take(stream(small), 5)
    for world in (2, 3):
        ranks = [take(stream(small, rank=rank, world=world), 5) for rank in range(world)]
        joined = [tuple(torch.cat([ranks[r][s][k] for r in range(world)]) for k in (0, 1)) for s in range(5)]
        assert same(plain, joined)


def test_the_stream_resumes_at_any_step(small):
    plain = take(stream(small), 9)
    for start in (1, 4, 7):                                   # step 4 lies across the end of an epoch
        assert same(plain[start:], take(stream(small, start_step=start), 9 - start))
    assert same(plain[4:], take(stream(small, start_step=4, workers=2), 5))


def test_order_and_crops_do_not_depend_on_the_batch_size(small):
    four, six = (torch.cat([images for images, _ in take(stream(small, batch_size=b), 24 // b)]) for b in (4, 6))
    assert torch.equal(four, six)


def test_every_epoch_shows_every_image_once_in_a_new_order_and_with_new_crops(small):
    images = torch.cat([b[0] for b in take(stream(small, image_size=12, flip=False, random_crop=False, batch_size=23), 2)])
    first, second = ([image.numpy().tobytes() for image in part] for part in images.split(23))
    assert sorted(first) == sorted(second) == sorted(small.load(i).tobytes() for i in range(23)) and first != second
    crops = {image.numpy().tobytes() for batch in take(stream(small, batch_size=23), 2) for image in batch[0]}
    assert len(crops) == 46


def test_a_data_set_smaller_than_a_batch_works(small):
    few = small.subset(np.array([3, 7, 9]))
    batches = take(stream(few, batch_size=8, image_size=12, flip=False, random_crop=False), 3)
    assert [len(labels) for _, labels in batches] == [8, 8, 8]
    images = [image.numpy().tobytes() for batch in batches for image in batch[0]]
    assert all(images.count(few.load(i).tobytes()) == 8 for i in range(3))


def test_labels_belong_to_their_images(small):
    label_of = {small.load(i).tobytes(): small.labels[i] for i in range(23)}
    for images, labels in take(stream(small, image_size=12, flip=False, random_crop=False), 4):
        assert [label_of[image.numpy().tobytes()] for image in images] == labels.tolist()


def test_the_stream_leaves_the_global_random_state_alone(small):
    before = torch.get_rng_state()
    take(stream(small), 2)
    take(stream(small, workers=1), 2)
    assert torch.equal(before, torch.get_rng_state())


def test_workers_outlive_signals_from_their_first_moment_on(small):
    batches = iter(stream(small, workers=2))
    got = [next(batches)]
    workers = [str(worker.pid) for worker in multiprocessing.active_children()]
    for name in ("-TERM", "-INT"):                            # as from a terminal or a job scheduler, not from the parent
        subprocess.run(["kill", name, *workers], check=True)
    got += itertools.islice(batches, 8)
    assert same(got, take(stream(small), 9))


def test_a_crash_of_the_main_process_ends_its_workers():
    script = ("import data\nbatches = iter(data.ImageStream(data.open_images('shapes'), 32, 8, 0, workers=2))\n"
              "next(batches)\nraise SystemError('crash')")
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "crash" in done.stderr


def test_user_errors_of_the_stream(small):
    refused(lambda: stream(small, batch_size=7, world=2), names=["batch_size 7", "try 6"])
    refused(lambda: stream(small, seed=-1), names=["seed"])


# ------------------------------------------------------------------------------------------------
# unreadable images on the way

@pytest.mark.parametrize("workers", [0, 2])
def test_the_first_unreadable_image_stops_the_stream_with_its_name_in_one_line(tmp_path, workers):
    bad = put(folder_of(tmp_path / "set", 12) / "cat" / "bad.png", b"<html>")
    stopped = iter(stream(data.open_images(str(tmp_path / "set")), workers=workers))
    refused(lambda: stopped, names=[bad, "<html>"])


@pytest.mark.parametrize("workers", [0, 2])
def test_skip_bad_puts_the_next_image_in_its_place_and_says_so_once(tmp_path, capfd, workers):
    root = folder_of(tmp_path / "set", 10, ("cat",))
    put(root / "cat" / "004.png", b"")
    dataset = data.open_images(str(root))
    plain = dict(image_size=8, batch_size=10, flip=False, random_crop=False, skip_bad=True, workers=workers)
    for images, labels in take(stream(dataset, **plain), 3):
        shown = [image.numpy().tobytes() for image in images]
        assert shown.count(dataset.load(5).tobytes()) == 2 and len(set(shown)) == 9
    assert capfd.readouterr().err.count("004.png") == 1


def test_skip_bad_stops_above_one_percent(tmp_path):
    root = folder_of(tmp_path / "set", 200)
    for k in (0, 50):
        put(root / "cat" / f"{k:03}.png", b"")
    dataset = data.open_images(str(root))
    assert len(take(stream(dataset, skip_bad=True, batch_size=50), 8)) == 8           # 2 of 200 are 1%
    put(root / "cat" / "100.png", b"")
    refused(lambda: iter(stream(dataset, skip_bad=True, batch_size=50)), names=["3 of 200"])
    for file in root.rglob("*.png"):
        file.write_bytes(b"")
    refused(lambda: iter(stream(dataset, skip_bad=True)), names=["3 of 200"])         # and it does not hang


# ------------------------------------------------------------------------------------------------
# evaluation

@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_shows_every_image_once_in_order(small, workers):
    batches = list(data.eval_batches(small, 12, 10, workers=workers))
    assert [len(labels) for _, labels in batches] == [10, 10, 3]
    assert torch.equal(torch.cat([b[0] for b in batches]), torch.from_numpy(np.stack([small.load(i) for i in range(23)])))
    assert torch.cat([b[1] for b in batches]).tolist() == small.labels.tolist()


def test_evaluation_of_chosen_images_keeps_their_order(small):
    (images, labels), = data.eval_batches(small, 8, 10, indices=[7, 2, 2])
    assert labels.tolist() == small.labels[[7, 2, 2]].tolist()
    assert np.array_equal(images[0].numpy(), data.resize_crop(small.load(7), 8)) and torch.equal(images[1], images[2])


def test_evaluation_stops_at_an_unreadable_image_unless_told_otherwise(tmp_path):
    root = folder_of(tmp_path / "set", 6)
    bad = put(root / "cat" / "000.png", b"")
    dataset = data.open_images(str(root))
    refused(data.eval_batches, dataset, 8, 4, names=[bad])
    assert sum(len(labels) for _, labels in data.eval_batches(dataset, 8, 4, skip_bad=True)) == 6
