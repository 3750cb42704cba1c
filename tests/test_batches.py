"""batches.py: nothing disturbs the order of the batches, and an unreadable image is named."""
import itertools
import multiprocessing
import shutil
import signal
import subprocess
import time

import numpy as np
import pytest
import torch
from helpers import folder_of, packed, program, put, refused, same, take

from plumbing import batches, datasets
from plumbing.batches import ImageStream, eval_batches
from plumbing.images import resize_crop

# ------------------------------------------------------------------------------------------------
# the stream

@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """23 images of 12 x 12 in a zip, of which every process opens its own handle."""
    root = tmp_path_factory.mktemp("stream")
    return datasets.open_images(packed(folder_of(root / "set", 23, size=12), root / "x.zip", ""))


def stream(dataset, **options):
    defaults = dict(image_size=8, batch_size=6, seed=5, flip=True, random_crop=True)
    return ImageStream(dataset, **{**defaults, **options})


def test_the_stream_is_the_same_with_and_without_workers(small):
    before = torch.get_rng_state()
    plain = take(stream(small), 9)  # more than two epochs
    assert plain[0][0].shape == (6, 8, 8, 3)
    assert plain[0][0].dtype == torch.uint8 and plain[0][1].dtype == torch.int64
    assert same(plain, take(stream(small, workers=2), 9))
    assert torch.equal(before, torch.get_rng_state()), "no global random number is drawn"
    assert not same(plain, take(stream(small, seed=6), 9))


def test_the_stream_is_the_same_for_one_and_two_and_three_ranks(small):
    plain = take(stream(small), 5)
    for world in (2, 3):
        ranks = [take(stream(small, rank=rank, world=world), 5) for rank in range(world)]
        for step in range(5):
            for k in (0, 1):  # images, labels
                assert torch.equal(plain[step][k], torch.cat([rank[step][k] for rank in ranks]))


def test_the_stream_resumes_at_any_step(small):
    plain = take(stream(small), 9)
    for start in (1, 4, 7):  # step 4 lies across the end of an epoch
        assert same(plain[start:], take(stream(small, start_step=start), 9 - start))
    assert same(plain[4:], take(stream(small, start_step=4, workers=2), 5))


def test_order_and_crops_do_not_depend_on_the_batch_size(small):
    four, six = take(stream(small, batch_size=4), 6), take(stream(small, batch_size=6), 4)
    four, six = (torch.cat([images for images, _ in each]) for each in (four, six))
    assert torch.equal(four, six)


def test_every_epoch_shows_every_image_once_in_a_new_order_and_with_new_crops(small):
    plain = take(stream(small, image_size=12, flip=False, random_crop=False, batch_size=23), 2)
    first, second = ([image.numpy().tobytes() for image in images] for images, _ in plain)
    label_of = {small.load(i).tobytes(): small.labels[i] for i in range(23)}
    assert sorted(first) == sorted(second) == sorted(label_of) and first != second
    assert [label_of[image] for image in first] == plain[0][1].tolist()
    crops = [images for images, _ in take(stream(small, batch_size=23), 2)]
    assert len({image.numpy().tobytes() for image in torch.cat(crops)}) == 46


def test_a_data_set_smaller_than_a_batch_works(small):
    few = small.subset(np.array([3, 7, 9]))
    batches = take(stream(few, batch_size=8, image_size=12, flip=False, random_crop=False), 3)
    assert [len(labels) for _, labels in batches] == [8, 8, 8]
    images = [image.numpy().tobytes() for batch in batches for image in batch[0]]
    assert all(images.count(few.load(i).tobytes()) == 8 for i in range(3))


def test_small_images_are_read_once_and_change_nothing(tmp_path):
    root = folder_of(tmp_path / "set", 6, size=12)
    dataset = datasets.open_images(str(root))
    plain = take(stream(dataset), 3)
    assert sorted(dataset.kept) == list(range(6))
    shutil.rmtree(root)
    assert same(plain, take(stream(dataset), 3))
    refused(datasets.ImageSet.load, dataset.subset(np.arange(2)), 0, names=["000.png"])
    with pytest.raises(ValueError, match="read-only"):
        dataset.load(0)[:] = 0


@pytest.mark.parametrize("small, keep, workers, kept", [
    (431, 2 ** 28, 0, 0), (432, 2 ** 28, 0, 6), (432, 2 * 432, 0, 2), (432, 2 ** 28, 1, 0)])
def test_large_images_and_too_many_and_those_of_workers_are_not_kept(
        tmp_path, monkeypatch, small, keep, workers, kept):
    monkeypatch.setattr(datasets, "SMALL", small)  # a 12 x 12 image has 432 bytes
    monkeypatch.setattr(datasets, "KEEP", keep)
    dataset = datasets.open_images(str(folder_of(tmp_path / "set", 6, size=12)))
    take(stream(dataset, workers=workers), 3)
    assert len(dataset.kept) == kept


def test_workers_outlive_signals_from_their_first_moment_on(small):
    batches = iter(stream(small, workers=2))
    got = [next(batches)]
    workers = [str(worker.pid) for worker in multiprocessing.active_children()]
    for name in ("-TERM", "-INT"):  # as from a terminal or a job scheduler, not from the parent
        subprocess.run(["kill", name, *workers], check=True)
    got += itertools.islice(batches, 8)
    assert same(got, take(stream(small), 9))


def test_a_crash_of_the_main_process_ends_its_workers():
    script = """
from plumbing import batches, datasets
stream = iter(batches.ImageStream(datasets.open_images('shapes'), 32, 8, 0, workers=2))
next(stream)
raise SystemError('crash')
"""
    done = program("-c", script)
    assert done.returncode == 1 and "crash" in done.stderr


def test_user_errors_of_the_stream(small):
    refused(lambda: stream(small, batch_size=7, world=2), names=["batch_size 7", "try 6"])
    refused(lambda: stream(small, seed=-1), names=["seed"])


# ------------------------------------------------------------------------------------------------
# workers that cannot hand over a batch

def test_batches_that_do_not_fit_into_shared_memory_are_refused_at_the_start(small, monkeypatch):
    batch = 6 * 8 * 8 * 3
    for free, enough in ((4 * batch, True), (4 * batch - 1, False)):
        monkeypatch.setattr(batches, "shared_memory_free", lambda free=free: free)
        if enough:
            assert len(take(stream(small, workers=2), 2)) == 2
        else:
            for made in (iter(stream(small, workers=2)), eval_batches(small, 8, 6, workers=2)):
                told = ["/dev/shm", "--shm-size", "--workers 0"]
                refused(lambda stream: stream, made, names=told)
    assert len(take(stream(small), 2)) == 2  # without workers nothing is shared
    monkeypatch.setattr(batches, "shared_memory_free", lambda: 4 * batch)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    refused(lambda: iter(stream(small, workers=2)), names=["4 data workers"])


def test_a_worker_without_shared_memory_says_so_in_one_line(small, monkeypatch):
    def full(self):
        raise RuntimeError("unable to allocate shared memory(shm): No space left on device\nmore")
    monkeypatch.setattr(torch.Tensor, "share_memory_", full)
    told = ["No space left on device", "--shm-size", "--workers 0"]
    for skip_bad in (None, True):  # it is no unreadable image
        refused(lambda skip: iter(stream(small, workers=2, skip_bad=skip)), skip_bad, names=told)


def test_a_batch_that_never_comes_is_waited_for_no_longer_than_the_timeout(small):
    class Stuck:
        def __len__(self):
            return 10

        def load(self, index, keep):
            time.sleep(3)
    began = time.time()
    told = ["1 data workers in 1 seconds", "/dev/shm", "--shm-size", "--workers 0", "--timeout"]
    refused(lambda: iter(stream(Stuck(), workers=1, timeout=1)), names=told)
    assert time.time() - began < 30


def test_workers_need_no_function_that_windows_lacks(small, monkeypatch):
    for name in ("pthread_sigmask", "sigwaitinfo"):
        monkeypatch.delattr(signal, name)
    assert same(take(stream(small, workers=2), 3), take(stream(small), 3))
    monkeypatch.delattr(signal, "SIGCHLD")  # of which torch's own loader asks only elsewhere
    with batches.starting_workers():
        pass


# ------------------------------------------------------------------------------------------------
# unreadable images on the way

@pytest.mark.parametrize("skip_bad, workers", [(None, 0), (False, 0), (False, 2)])
def test_an_unreadable_image_is_named_and_skip_bad_advised_where_there_is_such_a_flag(
        tmp_path, skip_bad, workers):
    bad = put(folder_of(tmp_path / "set", 12) / "cat" / "bad.png", b"<html>")
    dataset = datasets.open_images(str(tmp_path / "set"))
    for made in (iter(stream(dataset, skip_bad=skip_bad, workers=workers)),
                 eval_batches(dataset, 8, 4, skip_bad=skip_bad, workers=workers)):
        told = [bad, "an HTML page", "replace or remove it"]
        message = refused(lambda made: made, made, names=told)
        assert ("--skip_bad" in message) == (skip_bad is False)


@pytest.mark.parametrize("workers", [0, 2])
def test_skip_bad_puts_the_next_image_in_its_place_and_says_so_once(tmp_path, capfd, workers):
    root = folder_of(tmp_path / "set", 10, ("cat",))
    put(root / "cat" / "004.png", b"")
    dataset = datasets.open_images(str(root))
    plain = dict(image_size=8, batch_size=10, flip=False, random_crop=False)
    for images, _ in take(stream(dataset, skip_bad=True, workers=workers, **plain), 3):
        shown = [image.numpy().tobytes() for image in images]
        assert shown.count(dataset.load(5).tobytes()) == 2 and len(set(shown)) == 9
    told = capfd.readouterr().err
    assert told.count("004.png") == 1 and "--skip_bad" not in told


def test_skip_bad_stops_above_one_percent(tmp_path):
    root = folder_of(tmp_path / "set", 200)
    for k in (0, 50):
        put(root / "cat" / f"{k:03}.png", b"")
    dataset = datasets.open_images(str(root))
    assert len(take(stream(dataset, skip_bad=True, batch_size=50), 8)) == 8  # 2 of 200 are 1%
    put(root / "cat" / "100.png", b"")
    dataset = datasets.open_images(str(root))
    refused(lambda: iter(stream(dataset, skip_bad=True, batch_size=50)), names=["3 of 200"])
    for file in root.rglob("*.png"):
        file.write_bytes(b"")
    dataset = datasets.open_images(str(root))
    # and it does not hang
    refused(lambda: iter(stream(dataset, skip_bad=True)), names=["3 of 200"])


# ------------------------------------------------------------------------------------------------
# evaluation

@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_shows_every_image_once_in_order(small, workers):
    batches = list(eval_batches(small, 12, 10, workers=workers))
    assert [len(labels) for _, labels in batches] == [10, 10, 3]
    images = np.stack([small.load(i) for i in range(23)])
    assert np.array_equal(torch.cat([b[0] for b in batches]).numpy(), images)
    assert torch.cat([b[1] for b in batches]).tolist() == small.labels.tolist()
    (images, labels), = eval_batches(small, 8, 10, indices=[7, 2, 2], workers=workers)
    assert labels.tolist() == small.labels[[7, 2, 2]].tolist(), "chosen ones keep their order"
    assert np.array_equal(images[0].numpy(), resize_crop(small.load(7), 8))
    assert torch.equal(images[1], images[2])


def test_evaluation_passes_over_an_unreadable_image_where_told_to(tmp_path):
    root = folder_of(tmp_path / "set", 6)
    put(root / "cat" / "000.png", b"")
    dataset = datasets.open_images(str(root))
    assert sum(len(labels) for _, labels in eval_batches(dataset, 8, 4, skip_bad=True)) == 6
