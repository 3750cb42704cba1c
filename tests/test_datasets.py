"""datasets.py: folders and arrays as people have them, their classes, and the held-out images."""
import os
import pickle
import shutil

import numpy as np
import pytest

from helpers import PNG, folder_of, noise, packed, put, refused
from plumbing import datasets
from plumbing.shapes import HELD_OUT, TOTAL

# ------------------------------------------------------------------------------------------------
# folders

def test_class_folders_become_labels_in_sorted_order_whatever_lies_above(tmp_path):
    inner = folder_of(tmp_path / "outer" / "pets", 6, ("dog", "ant", "cat"))
    (inner / "cat" / "x.jpg").mkdir()  # a folder, so no image
    dataset = datasets.open_images(str(inner))
    assert dataset.name == "pets" and dataset.classes == ["ant", "cat", "dog"]
    assert dataset.labels.dtype == np.int64 and dataset.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert np.array_equal(dataset.load(0), noise(1, 8, 8))
    assert np.array_equal(dataset.load(5), noise(3, 8, 8))
    outer = datasets.open_images(str(tmp_path / "outer"))
    assert outer.classes == dataset.classes and outer.fingerprint == dataset.fingerprint


def test_a_flat_folder_is_one_class(tmp_path):
    for name in ("b.png", "a.PNG"):
        put(tmp_path / name, PNG)
    put(tmp_path / "README.txt", b"words")
    dataset = datasets.open_images(str(tmp_path))
    assert dataset.classes == ["all"] and dataset.labels.tolist() == [0, 0]


def test_user_errors_of_folders(tmp_path):
    refused(datasets.open_images, str(tmp_path / "gone"), names=["gone", "no such"])
    refused(datasets.open_images, put(tmp_path / "a.rar", b"x"), names=["a.rar", ".tar"])
    (tmp_path / "empty").mkdir()
    refused(datasets.open_images, str(tmp_path / "empty"), names=["empty", ".jpeg"])
    root = folder_of(tmp_path / "set", 4)
    (root / "cow").mkdir()
    refused(datasets.open_images, str(root), names=["cow", "no images"])
    (root / "cow").rmdir()
    put(root / "top.png", b"")
    refused(datasets.open_images, str(root), names=["top.png", "dog/003.png"])
    for part in ("train", "test"):
        folder_of(tmp_path / "both" / part, 4)
    refused(datasets.open_images, str(tmp_path / "both"),
            names=["train/dog", "test/cat", "give the folder"])


def test_links_work_unless_they_dangle_or_lead_back(tmp_path):
    root = folder_of(tmp_path / "set", 4)
    (root / "dog" / "link.png").symlink_to(root / "cat" / "000.png")
    assert len(datasets.open_images(str(root))) == 5
    (root / "dog" / "dangling.png").symlink_to(root / "gone.png")
    refused(datasets.open_images, str(root), names=["dangling.png", "link"])
    (root / "dog" / "dangling.png").unlink()
    (root / "dog" / "loop").symlink_to(root)
    refused(datasets.open_images, str(root), names=["link"])


def test_a_name_that_is_not_utf8_is_read_and_its_class_can_be_printed(tmp_path):
    root = folder_of(tmp_path / "set", 4)
    try:
        os.rename(root / "cat", os.fsencode(root) + b"/caf\xe9")  # é in Latin-1
    except OSError:
        pytest.skip("this file system takes only UTF-8")
    put(root / "dog" / os.fsdecode(b"\xff.png"), PNG)
    dataset = datasets.open_images(str(root))
    assert dataset.classes == ["caf\\xe9", "dog"]
    assert np.array_equal(dataset.load(0), noise(0, 8, 8)) and dataset.load(4).shape == (4, 6, 3)
    put(root / "dog" / os.fsdecode(b"\xff.png"), b"")
    refused(datasets.open_images(str(root)).load, 4, names=["the file is empty"])


def test_a_folder_called_like_the_built_in_images_is_mentioned(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert len(datasets.open_images("shapes")) == TOTAL - HELD_OUT and capsys.readouterr().err == ""
    folder_of(tmp_path / "shapes", 4)
    assert len(datasets.open_images("shapes")) == TOTAL - HELD_OUT
    assert "give ./shapes" in capsys.readouterr().err
    assert len(datasets.open_images("./shapes")) == 4


@pytest.mark.parametrize("form", ["folder", "x.tar", "x.zip", "x.tar.gz"])
def test_an_image_made_anew_with_the_same_name_and_size_is_another_one(tmp_path, form):
    root = folder_of(tmp_path / "set", 6)

    def fingerprint():
        path = str(root) if form == "folder" else packed(root, tmp_path / form, "")
        return datasets.open_images(path).fingerprint
    shutil.copytree(root, tmp_path / "moved" / "copy")
    before = datasets.open_images(str(tmp_path / "moved" / "copy")).fingerprint
    assert fingerprint() == before
    file = root / "dog" / "003.png"
    pixels, times = file.read_bytes(), file.stat()
    put(file, pixels[:-20] + bytes([pixels[-20] ^ 1]) + pixels[-19:])
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert fingerprint() != before
    put(file, pixels)
    os.utime(file, (10 ** 9, 10 ** 9))
    assert fingerprint() == before, "only what a file holds counts, not when it was written"
    put(root / "cat" / "new.png", PNG)
    assert fingerprint() != before


def test_of_many_and_large_files_a_fixed_choice_of_pieces_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets, "FILES_READ", 10)
    monkeypatch.setattr(datasets, "BYTES_READ", 10 * 80)
    root = tmp_path / "set"
    for k in range(40):
        put(root / f"{k:02}.png", bytes([k]) * 1000)
    whole = datasets.open_images(str(root)).fingerprint
    assert whole == datasets.open_images(packed(root, tmp_path / "x.zip", "")).fingerprint
    noticed = 0
    for k in range(40):
        put(root / f"{k:02}.png", bytes([k]) * 990 + b"another end"[:10])
        noticed += datasets.open_images(str(root)).fingerprint != whole
        put(root / f"{k:02}.png", bytes([k]) * 1000)
    assert noticed == 10


# ------------------------------------------------------------------------------------------------
# arrays

def test_an_npz_gives_its_images_labels_and_names(tmp_path):
    x, path = np.stack([noise(k, 6, 7) for k in range(5)]), str(tmp_path / "a.npz")
    np.savez(path, x=x, y=np.array([0, 2, 1, 0, 2]))
    dataset = datasets.open_images(path)
    assert dataset.classes == ["0", "1", "2"] and dataset.labels.tolist() == [0, 2, 1, 0, 2]
    assert np.array_equal(pickle.loads(pickle.dumps(dataset)).load(3), x[3])
    y = np.array([0, 1, 2, 0, 1], np.uint8)
    np.savez_compressed(path, x=x, y=y, classes=["cat", "dog", "emu"])
    assert datasets.open_images(path).classes == ["cat", "dog", "emu"]
    assert datasets.open_images(path).fingerprint != dataset.fingerprint
    np.savez(path, x=x)
    assert datasets.open_images(path).classes == ["all"]


@pytest.mark.parametrize("kind, numbers", [
    (np.uint8, (1, 2, 3)), (np.uint8, (0, 100, 255)), (np.int8, (0, 126, 127)),
    (">i4", (0, 500, 999)), (np.int64, (0, 1, 2 ** 40)), (np.uint64, (0, 1, 2 ** 64 - 1))])
def test_labels_of_any_type_are_counted_and_numbers_without_images_are_told(
        tmp_path, capsys, kind, numbers):
    y = np.array(numbers, kind)[[2, 0, 1, 2]]
    np.savez(tmp_path / "a.npz", x=np.zeros((4, 6, 7, 3), np.uint8), y=y)
    dataset = datasets.open_images(str(tmp_path / "a.npz"))
    assert dataset.classes == list(map(str, numbers)) and dataset.labels.tolist() == [2, 0, 1, 2]
    assert dataset.labels.dtype == np.int64
    told = capsys.readouterr().err
    gaps = numbers[2] - numbers[0] - 2
    assert (f"{gaps:,} numbers between are without images" in told) == (gaps > 0 or numbers[0] > 1)


def test_classes_that_are_named_and_have_no_images_are_told(tmp_path, capsys):
    x, path = np.zeros((2, 6, 7, 3), np.uint8), str(tmp_path / "a.npz")
    np.savez(path, x=x, y=[0, 2], classes=["cat", "dog", "emu", "owl"])
    dataset = datasets.open_images(path)
    assert dataset.classes == ["cat", "dog", "emu", "owl"] and dataset.labels.tolist() == [0, 2]
    assert "no images of dog, owl; nothing can be learned of them" in capsys.readouterr().err


def test_more_labels_than_any_data_set_has_classes_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets, "MAX_CLASSES", 3)
    path = str(tmp_path / "a.npz")
    np.savez(path, x=np.zeros((4, 6, 7, 3), np.uint8), y=np.arange(4))  # numbers of the images
    refused(datasets.open_images, path, names=["a.npz", "4 different labels", "more than 3"])


class Evil:
    def __reduce__(self):
        return os.mkdir, ("pickle-was-run",)


def test_pickles_never_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.savez("a.npz", x=noise(0)[None], y=np.array([Evil()], dtype=object))
    refused(datasets.open_images, "a.npz", names=["a.npz", "pickle"])
    with open("b.npz", "wb") as file:
        pickle.dump(Evil(), file)
    refused(datasets.open_images, "b.npz", names=["b.npz"])
    assert not os.path.exists("pickle-was-run")


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_a_torn_or_flipped_npz_is_refused(tmp_path, save):
    path = tmp_path / "a.npz"
    save(path, x=np.stack([noise(0)] * 3), y=np.arange(3))
    whole = path.read_bytes()
    for share in (0, 0.5, 0.99):
        path.write_bytes(whole[:int(share * len(whole))])
        refused(datasets.open_images, str(path), names=["a.npz"])
    for place in range(300, len(whole) - 600, 613):
        path.write_bytes(bytes(b ^ (k == place) for k, b in enumerate(whole)))
        refused(datasets.open_images, str(path), names=["a.npz"])


@pytest.mark.parametrize("arrays, word", [
    (dict(images=noise(0)[None]), "no array x"), (dict(x=noise(0)), "(n, H, W, 3)"),
    (dict(x=np.zeros((2, 4, 4, 3))), "float64"),
    (dict(x=np.zeros((2, 4, 4, 1), np.uint8)), "(n, H, W, 3)"),
    (dict(x=np.zeros((0, 4, 4, 3), np.uint8)), "(n, H, W, 3)"),
    (dict(x=noise(0)[None], y=[0, 1]), "labels"),
    (dict(x=noise(0)[None], y=[-1]), "labels"), (dict(x=noise(0)[None], y=[0.5]), "labels"),
    (dict(x=noise(0)[None], y=[3], classes=["a"]), "label 3")])
def test_an_npz_of_the_wrong_make_is_refused_with_what_was_found(tmp_path, arrays, word):
    path = str(tmp_path / "a.npz")
    np.savez(path, **arrays)
    refused(datasets.open_images, path, names=["a.npz", word])


# ------------------------------------------------------------------------------------------------
# held-out images

def test_held_out_images_are_set_aside_and_together_they_are_all(tmp_path):
    root = str(folder_of(tmp_path / "set", 40))
    train, val = datasets.train_and_val(root, "", 1000, 3)
    assert (len(train), len(val)) == (36, 4)  # at most a tenth
    whole = datasets.open_images(root)
    images = [part.load(i).tobytes() for part in (train, val) for i in range(len(part))]
    assert sorted(images) == sorted(whole.load(i).tobytes() for i in range(40))
    again, _ = datasets.train_and_val(root, "", 1000, 3)
    other, _ = datasets.train_and_val(root, "", 1000, 4)
    assert again.fingerprint == train.fingerprint != other.fingerprint != whole.fingerprint
    assert np.array_equal(again.labels, train.labels)
    assert all(np.array_equal(again.load(i), train.load(i)) for i in range(36))
    assert len(datasets.train_and_val(root, "", 2, 3)[1]) == 2


def test_tiny_data_sets_still_have_a_held_out_image(tmp_path, capsys):
    train, val = datasets.train_and_val(str(folder_of(tmp_path / "two", 2)), "", 1000, 0)
    assert (len(train), len(val)) == (1, 1) and not np.array_equal(train.load(0), val.load(0))
    train, val = datasets.train_and_val(str(folder_of(tmp_path / "one", 1)), "", 1000, 0)
    assert np.array_equal(train.load(0), val.load(0)) and "single image" in capsys.readouterr().err


def test_given_held_out_images_must_have_the_same_classes_or_none(tmp_path):
    root = str(folder_of(tmp_path / "set", 4))
    same = str(folder_of(tmp_path / "same", 2, first=4))
    assert len(datasets.train_and_val(root, same, 0, 0)[1]) == 2
    flat = put(tmp_path / "flat" / "a.png", PNG)
    assert datasets.train_and_val(root, os.path.dirname(flat), 0, 0)[1].classes == ["all"]
    other = str(folder_of(tmp_path / "other", 2, ("cat", "emu")))
    refused(datasets.train_and_val, root, other, 0, 0, names=["missing: dog", "extra: emu"])
    shapes = datasets.train_and_val("shapes", "", 5, 0)
    assert [len(part) for part in shapes] == [TOTAL - HELD_OUT, HELD_OUT]


def as_npz(path, root) -> str:
    images = datasets.open_images(str(root))
    np.savez(path, x=np.stack([images.load(i) for i in range(len(images))]), y=images.labels,
             classes=images.classes)
    return str(path)


def copies(root, tmp) -> dict[str, str]:
    """What may be given as held-out images and is learned from: {how it was made: path}."""
    for k, file in enumerate(sorted(root.rglob("*.png"))):
        put(tmp / "copy" / "deeper" / file.parent.name / f"other-{k}.png", file.read_bytes())
    return {"the same": str(root), "under other names": str(tmp / "copy"),
            "some of them": str(folder_of(tmp / "some", 10)),
            "packed": packed(root, tmp / "x.zip", ""), "as arrays": as_npz(tmp / "x.npz", root)}


@pytest.mark.parametrize("learned", ["the same", "as arrays"])
def test_held_out_images_that_are_all_learned_from_are_told(tmp_path, learned, capsys):
    made = copies(folder_of(tmp_path / "set", 30), tmp_path)
    for val in made.values():
        n = len(datasets.train_and_val(made[learned], val, 0, 0)[1])
        assert capsys.readouterr().err.startswith(
            f"note: {val}: {n} of {n} images that were looked for are also in {made[learned]}: "
            "they are learned from, not held out")


def test_the_built_in_shapes_are_not_held_out_of_themselves(capsys):
    datasets.train_and_val("shapes", "shapes", 0, 0)
    assert "500 of 500 images" in capsys.readouterr().err
    assert len(datasets.train_and_val("shapes", "shapes:val", 0, 0)[1]) == HELD_OUT
    assert capsys.readouterr().err == ""


def test_held_out_images_some_of_which_are_learned_from_are_told(tmp_path, capsys):
    root = folder_of(tmp_path / "set", 30)
    val = folder_of(tmp_path / "val", 12, first=25)  # five of these are among the 30
    train, held = datasets.train_and_val(str(root), str(val), 0, 0)
    assert "5 of 12 images that were looked for are also in" in capsys.readouterr().err
    assert datasets.seen_before(train, held) == (5, 12)
    datasets.train_and_val(str(root), str(folder_of(tmp_path / "new", 12, first=30)), 0, 0)
    assert capsys.readouterr().err == ""


def test_what_is_set_aside_from_images_that_come_twice_is_told(tmp_path, capsys):
    root = folder_of(tmp_path / "set", 20)
    datasets.train_and_val(str(root), "", 1000, 0)
    assert capsys.readouterr().err == ""
    for k, file in enumerate(sorted(root.rglob("*.png"))):
        put(file.with_name(f"again-{k}.png"), file.read_bytes())
    datasets.train_and_val(str(root), "", 1000, 0)
    assert "so it holds them twice" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------
# names that are spelled in two ways

NFC, NFD = "caf\u00e9", "cafe\u0301"  # é, and e with an accent of its own, as a Mac's disk keeps it


def test_a_name_is_the_same_in_both_unicode_forms(tmp_path, capsys):
    for part, name, first in (("nfc", NFC, 0), ("nfd", NFD, 0), ("val", NFD, 9)):
        folder_of(tmp_path / part, 9, (name, "cafz", "owl"), first=first)
    one, two = (datasets.open_images(str(tmp_path / part)) for part in ("nfc", "nfd"))
    assert one.classes == two.classes == ["cafz", NFC, "owl"]
    assert one.fingerprint == two.fingerprint and one.labels.tolist() == two.labels.tolist()
    assert all(np.array_equal(one.load(i), two.load(i)) for i in range(9))
    _, val = datasets.train_and_val(str(tmp_path / "nfc"), str(tmp_path / "val"), 0, 0)
    assert val.classes == one.classes and val.labels.tolist() == one.labels.tolist()
    packed_too = datasets.open_images(packed(tmp_path / "nfd", tmp_path / "x.zip", ""))
    assert packed_too.fingerprint == one.fingerprint
    np.savez(tmp_path / "x.npz", x=np.zeros((3, 4, 4, 3), np.uint8), y=[0, 1, 2],
             classes=["cafz", NFD, "owl"])
    assert datasets.open_images(str(tmp_path / "x.npz")).classes == one.classes


def test_one_class_whose_folder_is_there_in_both_forms_is_one_class(tmp_path, capsys):
    folder_of(tmp_path / "set", 9, (NFC, NFD, "owl"))
    if len(os.listdir(tmp_path / "set")) < 3:
        pytest.skip("this file system takes both for one name")
    dataset = datasets.open_images(str(tmp_path / "set"))
    assert dataset.classes == [NFC, "owl"] and dataset.labels.tolist() == [0] * 6 + [1] * 3
    assert NFC in capsys.readouterr().err
