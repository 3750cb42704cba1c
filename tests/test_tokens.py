"""tokens.py: every image is encoded once, as it is and mirrored; stage 3's order is kept."""
import dataclasses
import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import contents, noise, refused, same, take

from plumbing import datasets, tokens
from plumbing.batches import ImageStream
from plumbing.flags import need
from plumbing.processes import INTERRUPTED, Processes
from plumbing.tokens import TokenStream, cache_tokens

SIZE = 8


def encode(images: torch.Tensor) -> torch.Tensor:
    """A stand-in for the tokenizer: the red of each pixel in the first row, so a mirrored image
    reads backwards."""
    return images[:, 0, :, 0].long()  # (b, S, S, 3) -> (b, L = S)


class Counting:
    """encode, which remembers the images that it was given."""

    def __init__(self):
        self.seen = []

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        self.seen += [image.numpy().tobytes() for image in images]
        return encode(images)


@pytest.fixture
def dataset(tmp_path, monkeypatch):
    """11 images of 3 classes, in shards of 4: the last shard is short."""
    monkeypatch.setattr(tokens, "SHARD", 4)
    x = np.stack([noise(k, SIZE, SIZE) for k in range(11)])
    np.savez(tmp_path / "images.npz", x=x, y=np.arange(11) % 3)
    return datasets.open_images(str(tmp_path / "images.npz"))


def cached(folder, dataset, tokenizer="aaaa", flip=True, encode=encode, procs=None, **options):
    procs = procs or Processes("cpu")
    return cache_tokens(str(folder), tokenizer, dataset, SIZE, flip, encode, procs, **options)


# ------------------------------------------------------------------------------------------------
# the cache

def test_the_cache_holds_each_image_and_its_mirror_image_beside_its_label(tmp_path, dataset):
    ids, labels = cached(tmp_path / "tokens", dataset)
    assert ids.shape == (11, 2, SIZE) and labels.tolist() == [k % 3 for k in range(11)]
    for i in range(11):
        image = torch.tensor(dataset.load(i))[None]
        mirrored = image.numpy()[:, :, ::-1].copy()
        assert ids[i, 0].tolist() == encode(image)[0].tolist()
        turned = encode(torch.from_numpy(mirrored))[0].tolist()
        assert ids[i, 1].tolist() == turned != ids[i, 0].tolist()
    for others in (cached(tmp_path / "others", dataset, workers=1)[0],
                   cached(tmp_path / "one", dataset, flip=False)[0]):
        assert np.array_equal(ids[:, :others.shape[1]], others)
    assert others.shape == (11, 1, SIZE), "without flip there is one copy"


def test_an_image_that_stands_in_for_a_bad_one_brings_its_own_label(tmp_path, dataset):
    """Image 1 cannot be read, image 2 takes its place; under image 1's label the generator would
    learn a wrong class."""
    def read(key):
        need(key != 1, "image 1: torn")
        return dataset.read(key)
    broken = dataclasses.replace(dataset, read=read)
    ids, labels = cached(tmp_path / "tokens", broken, skip_bad=True)
    assert np.array_equal(ids[1], ids[2]) and labels[1] == labels[2] == 2 and labels[0] == 0


def test_only_a_missing_shard_is_encoded_again(tmp_path, dataset):
    before, _ = cached(tmp_path / "tokens", dataset, flip=False)
    counting = Counting()
    after, _ = cached(tmp_path / "tokens", dataset, flip=False, encode=counting)
    assert counting.seen == [] and np.array_equal(before, after)
    (tmp_path / "tokens" / "00001.npz").unlink()
    (tmp_path / "tokens" / f".00001.npz.tmp-{os.getpid()}").write_bytes(b"half of a killed run")
    after, _ = cached(tmp_path / "tokens", dataset, flip=False, encode=counting)
    assert counting.seen == [dataset.load(i).tobytes() for i in range(4, 8)]
    assert np.array_equal(before, after)
    found = sorted(os.listdir(tmp_path / "tokens"))
    assert found == ["00000.npz", "00001.npz", "00002.npz", "index.json"]


def test_tokens_of_another_tokenizer_or_of_other_images_are_refused_and_kept(tmp_path, dataset):
    folder = tmp_path / "tokens"
    cached(folder, dataset)
    before = contents(folder)
    fewer = dataset.subset(np.arange(10))
    told = [str(folder), "stale", "tokenizer: aaaa -> bbbb"]
    refused(lambda: cached(folder, dataset, tokenizer="bbbb"), names=told)
    told = [f"images: {dataset.fingerprint} -> {fewer.fingerprint}"]
    refused(lambda: cached(folder, fewer), names=told)
    refused(lambda: cached(folder, dataset, flip=False), names=["copies: 2 -> 1"])
    assert before == contents(folder)


def test_a_single_id_above_65535_spoils_no_other_shard(tmp_path, dataset):
    last = torch.from_numpy(dataset.load(10))

    def one_large(images):
        return encode(images) + 65536 * (images == last).all(dim=(1, 2, 3))[:, None]
    plain, _ = cached(tmp_path / "plain", dataset, flip=False)
    ids, _ = cached(tmp_path / "large", dataset, flip=False, encode=one_large)
    assert np.array_equal(ids[:10], plain[:10])
    assert np.array_equal(ids[10], plain[10].astype(np.int64) + 65536)
    for offset in (65535 - 255, 200_000):  # of large codebooks
        ids, _ = cached(tmp_path / str(offset), dataset, flip=False,
                        encode=lambda images, offset=offset: encode(images) + offset)
        assert np.array_equal(ids.astype(np.int64), plain.astype(np.int64) + offset)


def test_a_signal_ends_the_caching_and_what_is_there_is_kept(tmp_path, dataset, capsys):
    procs, alone = Processes("cpu"), cached(tmp_path / "alone", dataset)[0]

    class Signalled(Counting):
        def __call__(self, images):
            procs.stop = procs.stop or len(self.seen) >= 8  # in the second shard
            return super().__call__(images)
    with pytest.raises(SystemExit) as ended:
        cached(tmp_path / "tokens", dataset, encode=Signalled(), procs=procs)
    assert ended.value.code == INTERRUPTED and "repeat the command" in capsys.readouterr().out
    assert "00000.npz" in os.listdir(tmp_path / "tokens")
    assert "00002.npz" not in os.listdir(tmp_path / "tokens")
    assert np.array_equal(cached(tmp_path / "tokens", dataset)[0], alone)


def test_processes_share_the_shards_even_if_one_looks_when_the_other_is_done(tmp_path, dataset):
    first, second = Counting(), Counting()

    def late():
        if first.seen and not second.seen:  # the first process waits for the second one at the end
            procs = SimpleNamespace(stop=False, rank=1, world=2, main=False, barrier=lambda: None)
            results.append(cached(tmp_path / "tokens", dataset, encode=second, procs=procs)[0])
    results = []
    procs = SimpleNamespace(stop=False, rank=0, world=2, main=True, barrier=late)
    results.append(cached(tmp_path / "tokens", dataset, encode=first, procs=procs)[0])
    alone, _ = cached(tmp_path / "alone", dataset)
    assert len(results) == 2 and all(np.array_equal(ids, alone) for ids in results)
    assert len(first.seen) == 2 * (4 + 3) and len(second.seen) == 2 * 4


# ------------------------------------------------------------------------------------------------
# the stream

N, L = 23, 3
# image + 1000 copy + 100 place
IDS = np.arange(N)[:, None, None] + np.array([0, 1000])[None, :, None] + np.array([0, 100, 200])
LABELS = np.arange(N) % 7


def stream(ids=IDS, labels=LABELS, **options):
    return TokenStream(ids, labels, **{**dict(batch_size=6, seed=5), **options})


def images_and_copies(batches):
    first = torch.cat([ids[:, 0] for ids, _ in batches])
    return first % 1000, first // 1000


def test_batches_are_rows_of_ids_with_their_labels():
    for ids, labels in take(stream(ids=IDS.astype(np.uint16)), 9):  # more than two epochs
        assert ids.shape == (6, L) and ids.dtype == labels.dtype == torch.int64
        image, copy = ids[:, 0] % 1000, ids[:, 0] // 1000
        assert labels.tolist() == (image % 7).tolist()
        # all tokens of a row come from the same copy
        assert np.array_equal(ids.numpy(), IDS[image, copy])
    image, copy = images_and_copies(take(stream(ids=IDS[:, :1]), 9))
    assert copy.sum() == 0 and len(set(image.tolist())) == N, "the only copy is taken"


def test_the_order_is_that_of_the_images_for_any_batch_number_of_ranks_and_first_step():
    pictures = ImageStream(datasets.open_images("shapes").subset(np.arange(N)), 32, 6, seed=5)
    order = [index for step in range(9) for index, _ in pictures.plan(step)]
    whole = take(stream(), 9)
    assert images_and_copies(whole)[0].tolist() == order
    # a batch larger than the data set
    assert images_and_copies(take(stream(batch_size=54), 1))[0].tolist() == order
    ranks = [take(stream(rank=rank, world=2, start_step=3), 6) for rank in (0, 1)]
    together = [tuple(map(torch.cat, zip(*batch))) for batch in zip(*ranks)]
    assert same(together, whole[3:]), "an epoch ends inside step 3"
    assert not same(whole, take(stream(seed=6), 9))


def test_every_epoch_shows_every_image_once_in_about_half_of_the_cases_mirrored():
    ids = np.stack([np.arange(400), np.arange(400) + 1000], axis=1)[:, :, None]
    labels = np.zeros(400, np.int64)
    epochs = [images_and_copies(take(stream(ids, labels, batch_size=400, start_step=k), 1))
              for k in range(4)]
    for image, copy in epochs:
        assert sorted(image.tolist()) == list(range(400)) and 150 < copy.sum() < 250
    # Whether an image is mirrored follows neither from the image nor from the epoch before.
    by_image = torch.stack([copy[image.argsort()] for image, copy in epochs])  # (epochs, images)
    for a in range(3):
        assert 150 < (by_image[a] == by_image[a + 1]).sum() < 250
    # Nor does it follow from its place: neighbours in the order differ as often as not.
    assert all(150 < (copy[1:] == copy[:-1]).sum() < 250 for _, copy in epochs)


def test_a_batch_that_cannot_be_shared_is_a_user_error():
    refused(lambda: stream(batch_size=7, world=2), names=["generator_batch_size 7", "2 processes"])
