"""The token cache: every training image as ids, encoded once, and batches of them for stage 3.

In       images of a data set, a frozen tokenizer's encode
Out      ids (n, copies, L), labels (n,);  copies is 2 when training mirrors images, the second one
         mirrored. In tokens/: index.json names the tokenizer and the images; 00000.npz ... hold ids
         and labels of SHARD images each. Processes take shards in turn; a shard exists whole or not
         at all, so a killed run goes on with the rest
Try      python -m plumbing.tokens
"""
import functools
import itertools
import math
import os
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from plumbing import checkpoint
from plumbing.batches import eval_batches, shown
from plumbing.datasets import ImageSet
from plumbing.flags import need
from plumbing.processes import Processes

SHARD, BATCH = 4096, 256


def cache_tokens(folder: str, tokenizer: str, dataset: ImageSet, image_size: int, flip: bool,
                 encode: Callable[[Tensor], Tensor], procs: Processes, workers: int = 0,
                 skip_bad: bool = False, timeout: int = 600) -> tuple[np.ndarray, np.ndarray]:
    """-> ids uint16 or int32 (n, copies, L), labels int64 (n,), from the cache as far as it exists.

    tokenizer   fingerprint of the weights behind `encode`: uint8 (b, S, S, 3) -> int64 (b, L)
    Raises UserError if the folder holds the tokens of another tokenizer or of other images.
    """
    copies = 2 if flip else 1
    index = {"tokenizer": tokenizer, "images": dataset.fingerprint, "copies": copies,
             "shard": SHARD, "image_size": image_size}
    if procs.main:
        os.makedirs(folder, exist_ok=True)
        checkpoint.sweep(folder)
        path = os.path.join(folder, "index.json")
        if os.path.exists(path):
            checkpoint.check_same(checkpoint.read_json(path), index, f"{folder} is stale, it")
        else:
            checkpoint.write_json(path, index)
    procs.barrier()
    shards = range(math.ceil(len(dataset) / SHARD))
    # Dealt before looking: a process that looks later finds shards of the others done, and would
    # count on differently.
    todo = [k for k in shards[procs.rank::procs.world]
            if not os.path.exists(shard_path(folder, k))]
    for k in tqdm(todo, desc="tokens    ", disable=not procs.main or not todo):
        members = np.arange(k * SHARD, min((k + 1) * SHARD, len(dataset)))
        rows, labels = [], []
        for images, y in eval_batches(dataset, image_size, BATCH, members, workers, skip_bad,
                                        timeout):
            if procs.stop:
                procs.leave(f"interrupted: the tokens up to here are in {folder}; "
                            "repeat the command to go on")
            both = [images, images.flip(2)][:copies]  # (b, S, S, 3): axis 2 runs along a row
            rows.append(torch.stack([encode(side) for side in both], dim=1))  # (b, copies, L)
            labels.append(y)  # not the data set's own: under skip_bad another image may stand in
        ids = torch.cat(rows).numpy()
        ids = ids.astype(np.uint16 if ids.max() < 2 ** 16 else np.int32)
        with checkpoint.replacing(shard_path(folder, k)) as file:
            np.savez(file, ids=ids, labels=torch.cat(labels).numpy())
    procs.barrier()
    parts = [np.load(shard_path(folder, k)) for k in shards]
    ids, labels = (np.concatenate([part[name] for part in parts]) for name in ("ids", "labels"))
    need(len(ids) == len(dataset), f"{folder} holds {len(ids)} images, not {len(dataset)}; "
         "delete it, it will be made again")
    return ids, labels


def shard_path(folder: str, k: int) -> str:
    return os.path.join(folder, f"{k:05}.npz")


@functools.lru_cache(maxsize=2)
def chosen_copies(n: int, copies: int, seed: int, epoch: int) -> np.ndarray:
    """Which copy of each image an epoch shows: int64 (n,), from 0 to copies - 1."""
    # TRAP: the key must differ from permutation's, or order and copies are made of the same random
    # bits; a 0 adds nothing.
    return np.random.default_rng((seed, epoch, 1)).integers(copies, size=n)


class TokenStream:
    """Training batches without end: iterate for (ids int64 (b, L), labels int64 (b,)) of this rank.

    The order is that of batches.shown(); which copy is taken depends on (seed, epoch, index).
    """

    def __init__(self, ids: np.ndarray, labels: np.ndarray, batch_size: int, seed: int,
                 rank: int = 0, world: int = 1, start_step: int = 0):
        need(batch_size % world == 0, f"generator_batch_size {batch_size} is not a multiple of the "
             f"{world} processes; try {max(1, batch_size // world) * world}")
        self.ids, self.labels, self.batch_size, self.seed = ids, labels, batch_size, seed
        self.rank, self.world, self.start_step = rank, world, start_step

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        n, copies = self.ids.shape[:2]
        for step in itertools.count(self.start_step):
            epochs, index = shown(n, self.batch_size, self.seed, self.rank, self.world, step)
            parts = [chosen_copies(n, copies, self.seed, epoch)[index[epochs == epoch]]
                     for epoch in np.unique(epochs).tolist()]
            copy = np.concatenate(parts)
            ids = torch.from_numpy(self.ids[index, copy].astype(np.int64))
            yield ids, torch.from_numpy(self.labels[index])


if __name__ == "__main__":
    # 6 images, 2 copies, 1 token
    ids = np.stack([np.arange(6), np.arange(6) + 100], axis=1)[:, :, None]
    print("Six images as tokens 0 .. 5, their mirror images 100 .. 105; batches of 4, an epoch "
          "ends in the middle of the second:")
    stream = TokenStream(ids, np.zeros(6, np.int64), batch_size=4, seed=0)
    for step, (batch, _) in zip(range(3), stream):
        print(f"  step {step}:", batch[:, 0].tolist())
