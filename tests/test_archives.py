"""archives.py: what an archive is, what lies in it, what is passed over or refused, and how."""
import gzip
import io
import os
import pickle
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from helpers import PNG, encoded, folder_of, noise, packed, put, refused
from plumbing import archives, datasets

FORMS = ("folder", "x.tar", "x.zip")


def in_form(root, form: str) -> str:
    """The folder itself, or an archive made of it beside it."""
    return str(root) if form == "folder" else packed(root, root.parent / form, "")


# ------------------------------------------------------------------------------------------------
# archives

@pytest.mark.parametrize("ending, prefix", [
    (".tar", ""), (".tar", "./"), (".zip", "./"), (".zip", "cifar/train/"),
    (".tar.gz", "cifar/train/"), (".tgz", ""), (".tar.xz", "./"), (".tar", "itself")])
def test_an_archive_equals_its_folder_bit_for_bit(tmp_path, ending, prefix):
    root = folder_of(tmp_path / "set", 5)
    folder = datasets.open_images(str(root))
    path = str(tmp_path / ("x" + ending))
    if prefix == "itself":
        with tarfile.open(path, "w") as archive:
            archive.add(root, ".")  # as tar -C set -cf x.tar . does: the first member is "./"
    else:
        packed(root, Path(path), prefix)
    archive = datasets.open_images(path)
    assert archive.classes == folder.classes and archive.fingerprint == folder.fingerprint
    assert archive.labels.tolist() == folder.labels.tolist()
    copy = pickle.loads(pickle.dumps(archive))
    for i in range(5):
        assert np.array_equal(archive.load(i), folder.load(i))
        assert np.array_equal(copy.load(i), folder.load(i))


def test_reading_an_archive_writes_nothing(tmp_path):
    root = folder_of(tmp_path / "set", 4)
    packed(root, tmp_path / "x.tar", "../../climbs/out/")
    packed(root, tmp_path / "x.zip", "deep/")
    packed(root, tmp_path / "x.tar.gz", "")
    before = sorted(tmp_path.rglob("*"))
    for name in ("x.zip", "x.tar.gz"):
        datasets.open_images(str(tmp_path / name)).load(0)
    refused(datasets.open_images, str(tmp_path / "x.tar"), names=["x.tar"])  # .. counts as hidden
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("true", [".tar", ".zip", ".tar.gz", ".tar.xz", ".npz"])
def test_the_first_bytes_and_not_the_name_say_what_an_archive_is(tmp_path, true):
    path = tmp_path / ("x" + true)
    if true == ".npz":
        np.savez(path, x=np.zeros((4, 8, 8, 3), np.uint8), y=[0, 1, 0, 1])
    else:
        packed(folder_of(tmp_path / "set", 4), path, "")
    for called in (".tar", ".zip", ".tar.gz", ".npz", ".dat", ""):
        path = path.rename(tmp_path / f"y{called}")
        dataset = datasets.open_images(str(path))
        assert len(dataset) == 4 and dataset.load(3).shape == (8, 8, 3)


@pytest.mark.parametrize("start, what", [(b"7z\xbc\xaf\x27\x1c", ".7z"), (b"Rar!\x1a\x07", ".rar"),
                                         (b"\x93NUMPY\x01", ".npy"), (b"(\xb5/\xfd", ".zstd")])
def test_another_kind_of_archive_is_refused_by_its_name(tmp_path, start, what):
    path = put(tmp_path / "photos.bin", start + bytes(600))
    refused(datasets.open_images, path, names=["photos.bin", what, "put images into a folder"])


def windows_zip(root, path, folders: bool) -> str:
    """As PowerShell 5 packs it: backslashes between the names."""
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(root.rglob("*")):
            name = str(file.relative_to(root)).replace("/", "\\")
            if file.is_file():
                archive.writestr(name, file.read_bytes())
            elif folders:
                archive.writestr(name + "\\", b"")
    return str(path)


@pytest.mark.parametrize("folders", [False, True])
def test_a_zip_with_backslashes_equals_its_folder(tmp_path, folders, capsys):
    root = folder_of(tmp_path / "set", 5)
    put(root / "__MACOSX" / "cat" / "000.png", b"not an image")
    dataset = datasets.open_images(windows_zip(root, tmp_path / "x.zip", folders))
    folder = datasets.open_images(str(root))
    assert dataset.classes == ["cat", "dog"] and dataset.fingerprint == folder.fingerprint
    assert np.array_equal(dataset.load(4), folder.load(4)) and capsys.readouterr().err == ""
    (root / "owl").mkdir()
    if folders:  # an empty class is one in any archive
        path = windows_zip(root, tmp_path / "y.zip", folders)
        refused(datasets.open_images, path, names=["no images in class folder owl"])


def test_a_backslash_beside_true_folders_belongs_to_the_name(tmp_path):
    put(tmp_path / "set" / "cat" / "a\\b.png", PNG)
    put(tmp_path / "set" / "dog" / "c.png", PNG)
    assert datasets.open_images(str(tmp_path / "set")).classes == ["cat", "dog"]


# ------------------------------------------------------------------------------------------------
# torn, damaged, hostile

@pytest.mark.parametrize("ending", [".tar.gz", ".tar.xz", ".zip", ".tar"])
def test_a_torn_archive_is_refused_and_leaves_nothing(tmp_path, ending):
    path = tmp_path / ("x" + ending)
    packed(folder_of(tmp_path / "set", 40), path, "")
    whole = path.read_bytes()
    if ending == ".tar":
        with tarfile.open(path) as archive:
            third = archive.getmembers()[2].offset
        # torn between two images, and with a damaged header
        for torn in (whole[:third], bytes(b ^ (k == third + 20) for k, b in enumerate(whole))):
            path.write_bytes(torn)
            refused(datasets.open_images, str(path), names=["x.tar", "torn"])
        whole = whole.rstrip(b"\0")  # up to 10 kB of zeros follow the end
    for torn in (whole[:0], whole[:len(whole) // 3], whole[:-len(whole) // 20], b"no archive"):
        path.write_bytes(torn)
        refused(datasets.open_images, str(path), names=[str(path)])
        assert sorted(os.listdir(tmp_path)) == ["set", path.name]


def test_a_damaged_image_in_an_archive_is_named_and_hinders_nobody_from_the_others(tmp_path):
    path = tmp_path / "x.zip"
    packed(folder_of(tmp_path / "set", 4), path, "")
    damaged = bytearray(path.read_bytes())
    damaged[120] ^= 1  # inside the first image
    path.write_bytes(damaged)
    dataset = datasets.open_images(str(path))
    refused(dataset.load, 0, names=["x.zip", "cat/000.png"])
    assert dataset.load(3).shape == (8, 8, 3)


def test_a_link_in_a_tar_is_refused_with_advice(tmp_path):
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w") as archive:
        link = tarfile.TarInfo("cat/1.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    refused(datasets.open_images, str(path), names=["cat/1.png", "--dereference"])


def test_what_unpacks_to_far_too_much_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "MAX_UNPACKED", 1 << 20)
    path = put(tmp_path / "bomb.tar.gz", gzip.compress(bytes(1 << 26)))  # zeros, in 65 kB
    refused(datasets.open_images, path, names=("bomb.tar.gz", "unpack it yourself"))


@pytest.mark.parametrize("form", ["x.tar", "x.zip"])
def test_an_image_file_that_is_too_large_is_named_before_it_is_read(tmp_path, monkeypatch, form):
    monkeypatch.setattr(archives, "MAX_FILE", 50)
    path = in_form(folder_of(tmp_path / "d", 4), form)
    refused(datasets.open_images, path, names=(".png", "an image may have 50"))


# ------------------------------------------------------------------------------------------------
# shards of WebDataset

def tar(path, samples: dict) -> str:
    """A tar of {name: content}."""
    with tarfile.open(path, "w") as archive:
        for name, content in samples.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return str(path)


def samples(numbers, texts, prefix="") -> dict:
    """Images and their classes, with what often lies beside them."""
    made = {}
    for k, text in zip(numbers, texts):
        made[f"{prefix}{k:04}.png"] = encoded(Image.fromarray(noise(k, 8, 8)), "PNG")
        made[f"{prefix}{k:04}.cls"] = text.encode()
        made[f"{prefix}{k:04}.json"] = b"{}"
    return made


def test_a_shard_is_read_in_place_with_its_classes(tmp_path, capsys):
    path = tar(tmp_path / "x.tar", samples(range(4), ["2", "0\n", "10", "2"], "part/a."))
    # a.0000.png: a sample is what stands before the first dot, so these would all be one
    refused(datasets.open_images, path, names=["x.tar", "holds no images"])
    path = tar(tmp_path / "x.tar", samples(range(4), ["2", "0\n", "10", "2"], "part/"))
    dataset = datasets.open_images(path)
    assert dataset.classes == ["0", "2", "10"] and dataset.labels.tolist() == [1, 0, 2, 1]
    assert np.array_equal(pickle.loads(pickle.dumps(dataset)).load(3), noise(3, 8, 8))
    told = capsys.readouterr().err
    assert "4 files passed over: 4 .json" in told and "8 numbers between are without images" in told
    assert sorted(os.listdir(tmp_path)) == ["x.tar"]


def test_a_folder_of_shards_is_one_data_set(tmp_path):
    root = tmp_path / "shards"
    root.mkdir()
    tar(root / "train-0001.tar", samples(range(3, 5), ["cat", "owl"]))
    tar(root / "train-0000.tar", samples(range(3), ["owl", "dog", "cat"]))
    dataset = datasets.open_images(str(root))
    assert dataset.classes == ["cat", "dog", "owl"] and dataset.labels.tolist() == [2, 1, 0, 0, 2]
    for k in range(5):
        assert np.array_equal(dataset.load(k), noise(k, 8, 8))
    whole = samples(range(5), ["owl", "dog", "cat", "cat", "owl"])
    one = datasets.open_images(tar(tmp_path / "one.tar", whole))
    assert one.fingerprint == dataset.fingerprint  # however they are packed
    whole["0004.cls"] = b"dog"
    other = datasets.open_images(tar(tmp_path / "one.tar", whole))
    assert other.fingerprint != dataset.fingerprint


def test_a_mask_beside_an_image_is_not_a_second_image(tmp_path, capsys):
    files = samples(range(2), ["0", "1"])
    files["0000.seg.png"] = PNG
    assert len(datasets.open_images(tar(tmp_path / "x.tar", files))) == 2
    assert "2 .json, 1 .png" in capsys.readouterr().err
    files["0000.jpg"] = PNG
    path = tar(tmp_path / "x.tar", files)
    refused(datasets.open_images, path, names=["0000.png is a second image of its sample"])


def test_shards_without_classes_are_refused_with_what_to_do(tmp_path):
    files = samples(range(3), ["0", "1", "0"])
    del files["0001.cls"]
    path = tar(tmp_path / "x.tar", files)
    refused(datasets.open_images, path, names=["x.tar: 0001.png has no class", "0001.cls"])
    root = tmp_path / "classes"
    root.mkdir()
    for name in ("cat", "dog"):  # as ImageNet comes: one tar per class
        tar(root / f"{name}.tar", {"1.png": PNG})
    refused(datasets.open_images, str(root), names=["cat.tar", ".cls", "folder named after"])


# ------------------------------------------------------------------------------------------------
# what is passed over

@pytest.mark.parametrize("form", FORMS)
def test_files_that_are_not_read_are_counted_by_their_endings_in_one_line(tmp_path, form, capsys):
    root = folder_of(tmp_path / "set", 4)
    for k in range(10):
        put(root / "cat" / f"{k}.HEIC", b"a picture, but not for Pillow")
    for name in ("labels.csv", "LICENSE", "x.a\nb"):
        put(root / name, b"words")
    path = in_form(root, form)
    assert len(datasets.open_images(path)) == 4
    told = capsys.readouterr().err
    assert told.startswith(f"note: {path}: 13 files passed over: 10 .heic, ")
    for kind in ("1 .csv", "1 without an ending", "1 with a damaged ending"):
        assert kind in told
    assert told.count("\n") == 1
    for file in root.rglob("*.png"):
        file.unlink()
    refused(datasets.open_images, in_form(root, form),
            names=["holds no images (13 files passed over: 10 .heic"])
    put(root / "dog" / "1.png", PNG)
    if form == "folder":
        refused(datasets.open_images, path, names=["class folder cat", "10 .heic"])


@pytest.mark.parametrize("rank, lines", [("0", 1), ("1", 0)])
def test_one_of_several_processes_says_it(tmp_path, capsys, monkeypatch, rank, lines):
    monkeypatch.setenv("RANK", rank)
    put(folder_of(tmp_path / "set", 4) / "a.txt", b"")
    datasets.open_images(str(tmp_path / "set"))
    assert capsys.readouterr().err.count("passed over") == lines


@pytest.mark.parametrize("form", FORMS)
def test_what_systems_leave_in_a_folder_is_no_class(tmp_path, form, capsys):
    root = folder_of(tmp_path / "set", 4)
    for name in ("lost+found", "System Volume Information", "$RECYCLE.BIN", "@eaDir",
                 "__pycache__", "__MACOSX", ".Trash-1000", "cat/.ipynb_checkpoints"):
        put(root / name / "thumb.png", b"not an image")
    for name in ("Thumbs.db", "._000.png"):
        put(root / "cat" / name, b"not an image")
    dataset = datasets.open_images(in_form(root, form))
    assert dataset.classes == ["cat", "dog"] and len(dataset) == 4
    assert capsys.readouterr().err == ""
