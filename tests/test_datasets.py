"""datasets.py: folders, archives and arrays as people have them, what is refused and how, and the held-out images."""
import gzip
import os
import pickle
import shutil
import tarfile

import numpy as np
import pytest

from config import TrainConfig
from helpers import PNG, folder_of, noise, packed, put, refused
from plumbing import datasets
from plumbing.shapes import HELD_OUT, TOTAL

# ------------------------------------------------------------------------------------------------
# folders

def test_class_folders_become_labels_in_sorted_order(tmp_path):
    dataset = datasets.open_images(str(folder_of(tmp_path / "pets", 6, ("dog", "ant", "cat"))))
    assert dataset.name == "pets" and dataset.classes == ["ant", "cat", "dog"]
    assert dataset.labels.dtype == np.int64 and dataset.labels.tolist() == [0, 0, 1, 1, 2, 2] and len(dataset) == 6
    assert np.array_equal(dataset.load(0), noise(1, 8, 8)) and np.array_equal(dataset.load(5), noise(3, 8, 8))


def test_a_flat_folder_is_one_class_and_other_files_do_not_count(tmp_path):
    for name in ("b.png", "a.PNG"):
        put(tmp_path / name, PNG)
    put(tmp_path / "README.txt", b"words")
    put(tmp_path / "labels.csv", b"1,2")
    (tmp_path / "folder.png").mkdir()
    dataset = datasets.open_images(str(tmp_path))
    assert dataset.classes == ["all"] and dataset.labels.tolist() == [0, 0]


@pytest.mark.parametrize("form", ["folder", "x.tar", "x.zip"])
def test_hidden_files_are_skipped(tmp_path, form):
    root = folder_of(tmp_path / "set", 4)
    for name in (".hidden/1.png", "cat/._000.png", "cat/.ipynb_checkpoints/000.png", "__MACOSX/cat/._000.png"):
        put(root / name, b"not an image")
    path = str(root) if form == "folder" else packed(root, tmp_path / form, "")
    dataset = datasets.open_images(path)
    assert dataset.classes == ["cat", "dog"] and len(dataset) == 4


def test_a_folder_named_like_an_image_is_no_image(tmp_path):
    root = folder_of(tmp_path / "set", 4)
    (root / "cat" / "x.jpg").mkdir()
    assert len(datasets.open_images(str(root))) == 4


def test_folders_above_the_classes_are_ignored_when_all_images_share_them(tmp_path):
    inner = folder_of(tmp_path / "outer" / "train", 4)
    outer, direct = datasets.open_images(str(tmp_path / "outer")), datasets.open_images(str(inner))
    assert outer.classes == direct.classes == ["cat", "dog"] and outer.fingerprint == direct.fingerprint


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


def test_train_and_test_side_by_side_are_refused_with_advice(tmp_path):
    for part in ("train", "test"):
        folder_of(tmp_path / part, 4)
    refused(datasets.open_images, str(tmp_path), names=["train/dog", "test/cat", "give the folder"])


def test_links_work_unless_they_dangle_or_lead_back(tmp_path):
    root = folder_of(tmp_path / "set", 4)
    (root / "dog" / "link.png").symlink_to(root / "cat" / "000.png")
    assert len(datasets.open_images(str(root))) == 5
    (root / "dog" / "dangling.png").symlink_to(root / "gone.png")
    refused(datasets.open_images, str(root), names=["dangling.png", "link"])
    (root / "dog" / "dangling.png").unlink()
    (root / "dog" / "loop").symlink_to(root)
    refused(datasets.open_images, str(root), names=["link"])


def test_the_fingerprint_follows_content_not_place(tmp_path):
    root = folder_of(tmp_path / "set", 4)
    before = datasets.open_images(str(root)).fingerprint
    shutil.copytree(root, tmp_path / "moved" / "copy")
    assert datasets.open_images(str(tmp_path / "moved" / "copy")).fingerprint == before
    put(root / "cat" / "new.png", PNG)
    assert datasets.open_images(str(root)).fingerprint != before
    assert int(before, 16) >= 0


# ------------------------------------------------------------------------------------------------
# archives

@pytest.mark.parametrize("prefix", ["", "./", "cifar/train/"])
@pytest.mark.parametrize("ending", [".tar", ".zip", ".tar.gz", ".tgz", ".tar.xz"])
def test_an_archive_equals_its_folder_bit_for_bit(tmp_path, ending, prefix):
    root = folder_of(tmp_path / "set", 5)
    folder = datasets.open_images(str(root))
    archive = datasets.open_images(packed(root, tmp_path / ("x" + ending), prefix), cache=str(tmp_path / "cache"))
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
    datasets.open_images(str(tmp_path / "x.zip")).load(0)
    refused(datasets.open_images, str(tmp_path / "x.tar"), names=["x.tar"])  # .. counts as hidden
    assert sorted(tmp_path.rglob("*")) == before


def test_a_compressed_tar_is_unpacked_once_and_again_when_it_changes(tmp_path, capsys):
    root, cache = folder_of(tmp_path / "set", 4), tmp_path / "run" / "cache"
    path = packed(root, tmp_path / "x.tar.gz", "")
    datasets.open_images(path, str(cache))
    assert "unpacking" in capsys.readouterr().err and len(os.listdir(cache)) == 1
    assert len(datasets.open_images(path, str(cache))) == 4 and capsys.readouterr().err == ""
    folder_of(root, 6)
    packed(root, tmp_path / "x.tar.gz", "")
    assert len(datasets.open_images(path, str(cache))) == 6


def test_unpacking_removes_what_a_killed_run_left_behind_and_blames_a_torn_archive_by_its_name(tmp_path):
    root, cache = folder_of(tmp_path / "set", 4), tmp_path / "cache"
    path = packed(root, tmp_path / "x.tar.gz", "")
    put(cache / f".x.tar.gz.abc.tar.tmp-{os.getpid()}", b"half of it")
    datasets.open_images(path, str(cache))
    assert [name.endswith(".tar") for name in os.listdir(cache)] == [True]
    put(tmp_path / "x.tar.gz", b"not gzip at all")
    assert refused(datasets.open_images, path, str(cache)).startswith(f"{path}: ")


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
    refused(datasets.open_images, str(path), str(tmp_path / "cache"), names=[path.name])
    assert os.listdir(tmp_path / "cache") == []


def test_a_tar_torn_between_two_images_is_refused(tmp_path):
    path = tmp_path / "x.tar"
    packed(folder_of(tmp_path / "set", 4), path, "")
    with tarfile.open(path) as archive:
        third = archive.getmembers()[2].offset
    whole = path.read_bytes()
    path.write_bytes(whole[:third])
    refused(datasets.open_images, str(path), names=["x.tar", "torn"])
    path.write_bytes(bytes(b ^ (k == third + 20) for k, b in enumerate(whole)))  # a damaged header
    refused(datasets.open_images, str(path), names=["x.tar", "torn"])


def test_a_damaged_image_in_an_archive_is_named(tmp_path):
    path = tmp_path / "x.zip"
    packed(folder_of(tmp_path / "set", 4), path, "")
    damaged = bytearray(path.read_bytes())
    damaged[120] ^= 1                                         # inside the first image
    path.write_bytes(damaged)
    refused(datasets.open_images(str(path)).load, 0, names=["x.zip", "cat/000.png"])


def test_a_link_in_a_tar_is_refused_with_advice(tmp_path):
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w") as archive:
        link = tarfile.TarInfo("cat/1.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    refused(datasets.open_images, str(path), names=["cat/1.png", "--dereference"])


# ------------------------------------------------------------------------------------------------
# arrays

def test_an_npz_gives_its_images_labels_and_names(tmp_path):
    x, path = np.stack([noise(k, 6, 7) for k in range(5)]), str(tmp_path / "a.npz")
    np.savez(path, x=x, y=np.array([0, 2, 1, 0, 2]))
    dataset = datasets.open_images(path)
    assert dataset.classes == ["0", "1", "2"] and dataset.labels.tolist() == [0, 2, 1, 0, 2]
    assert np.array_equal(pickle.loads(pickle.dumps(dataset)).load(3), x[3])
    np.savez_compressed(path, x=x, y=np.array([0, 1, 1, 0, 1], np.uint8), classes=["cat", "dog", "emu"])
    assert datasets.open_images(path).classes == ["cat", "dog", "emu"]
    assert datasets.open_images(path).fingerprint != dataset.fingerprint
    np.savez(path, x=x)
    assert datasets.open_images(path).classes == ["all"]


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
    (dict(x=np.zeros((2, 4, 4, 3))), "float64"), (dict(x=np.zeros((2, 4, 4, 1), np.uint8)), "(n, H, W, 3)"),
    (dict(x=np.zeros((0, 4, 4, 3), np.uint8)), "(n, H, W, 3)"), (dict(x=noise(0)[None], y=[0, 1]), "labels"),
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
    assert (len(train), len(val)) == (36, 4)                  # at most a tenth
    whole = datasets.open_images(root)
    images = [part.load(i).tobytes() for part in (train, val) for i in range(len(part))]
    assert sorted(images) == sorted(whole.load(i).tobytes() for i in range(40))
    again, _ = datasets.train_and_val(root, "", 1000, 3)
    other, _ = datasets.train_and_val(root, "", 1000, 4)
    assert again.fingerprint == train.fingerprint != other.fingerprint != whole.fingerprint
    assert all(np.array_equal(again.load(i), train.load(i)) and again.labels[i] == train.labels[i] for i in range(36))
    assert len(datasets.train_and_val(root, "", 2, 3)[1]) == 2


def test_tiny_data_sets_still_have_a_held_out_image(tmp_path, capsys):
    train, val = datasets.train_and_val(str(folder_of(tmp_path / "two", 2)), "", 1000, 0)
    assert (len(train), len(val)) == (1, 1) and not np.array_equal(train.load(0), val.load(0))
    train, val = datasets.train_and_val(str(folder_of(tmp_path / "one", 1)), "", 1000, 0)
    assert np.array_equal(train.load(0), val.load(0)) and "single image" in capsys.readouterr().out


def test_the_seed_that_sets_images_aside_is_never_negative():
    refused(lambda: TrainConfig(seed=-1), names=["seed -1", "0 or above"])


def test_given_held_out_images_must_have_the_same_classes_or_none(tmp_path):
    root = str(folder_of(tmp_path / "set", 4))
    assert len(datasets.train_and_val(root, str(folder_of(tmp_path / "same", 2)), 0, 0)[1]) == 2
    flat = put(tmp_path / "flat" / "a.png", PNG)
    assert datasets.train_and_val(root, os.path.dirname(flat), 0, 0)[1].classes == ["all"]
    other = str(folder_of(tmp_path / "other", 2, ("cat", "emu")))
    refused(datasets.train_and_val, root, other, 0, 0, names=["missing: dog", "extra: emu"])
    assert [len(part) for part in datasets.train_and_val("shapes", "", 5, 0)] == [TOTAL - HELD_OUT, HELD_OUT]


# ------------------------------------------------------------------------------------------------
# bombs: a few bytes that unpack to very many

def test_a_compressed_archive_stops_at_the_limit_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets, "ALWAYS_ALLOWED", 1 << 20)
    path = put(tmp_path / "bomb.tar.gz", gzip.compress(bytes(1 << 26)))  # 64 MiB of zeros in 65 kB
    refused(datasets.open_images, path, names=("bomb.tar.gz", "unpack to more than"))
    assert [p.name for p in tmp_path.iterdir()] == ["bomb.tar.gz"]


@pytest.mark.parametrize("ending", ["zip", "tar"])
def test_an_image_file_that_is_too_large_is_named_before_it_is_read(tmp_path, monkeypatch, ending):
    monkeypatch.setattr(datasets, "MAX_FILE", 50)
    refused(datasets.open_images, packed(folder_of(tmp_path / "d", 4), tmp_path / f"x.{ending}", "d/"), names=("image", "an image may have 50"))


def test_an_npz_that_unpacks_to_far_too_much_is_refused_unread(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets, "ALWAYS_ALLOWED", 1 << 20)
    np.savez_compressed(tmp_path / "bomb.npz", x=np.zeros((20000, 32, 32, 3), np.uint8))
    refused(datasets.open_images, str(tmp_path / "bomb.npz"), names=("bomb.npz", "unpack to more than"))
