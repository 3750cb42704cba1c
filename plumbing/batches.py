"""Batches whose order nothing can disturb: not the number of processes or workers, not a restart, not a signal.

In       an ImageSet
Out      images uint8 (b, S, S, 3) and labels int64 (b,); images.to_float makes the models' input of them

    ImageSet ─► load(i) ─► augment      ─► ImageStream     training: endless, shuffled anew in every epoch
                      └──► resize_crop  ─► eval_batches    evaluation: in order, once

How      which images a step sees is computed from the step's number; no state runs along that could be lost
Try      python -m plumbing.batches      (one process, two of them, and a restart: the same images at every step)
"""
import contextlib
import functools
import itertools
import math
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from plumbing.datasets import ImageSet
from plumbing.flags import UserError, need
from plumbing.images import augment, resize_crop

STOP_SIGNALS = {signal.SIGTERM, signal.SIGINT}


@contextlib.contextmanager
def stop_signals_blocked():
    """Processes started inside inherit the block; for this one, a signal comes through at the end."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def obey_only_the_parent(worker: int) -> None:
    """In a worker: signals to the whole process group must not stop it before the main process has saved.

    TRAP: a worker that simply ignores SIGTERM also ignores the main process, which at its exit would wait for ever.
    """
    def listen():
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != multiprocessing.parent_process().pid:
            pass
        os._exit(0)

    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    if hasattr(signal, "sigwaitinfo"):                        # a Mac has none
        threading.Thread(target=listen, daemon=True).start()


class Batches:
    """Batches by number, as DataLoader's map-style data set.

    plan   number -> [(index, transform)], the images of that batch
    """

    def __init__(self, dataset: ImageSet, plan: Callable, skip_bad: bool):
        self.dataset, self.plan = dataset, plan
        # unreadable images to put up with
        self.limit = max(1, len(dataset) // 100) if skip_bad else 0

    def __getitem__(self, number: int) -> tuple[Tensor | None, Tensor | None, list[str]]:
        """images uint8 (b, S, S, 3), labels int64 (b,), errors. No images when there are more errors than the limit.

        Errors travel as text: DataLoader would wrap an exception of a worker into pages of traceback.
        """
        images, labels, errors = [], [], []
        for index, transform in self.plan(number):
            while len(images) == len(labels):                 # until one more image has been read
                try:
                    images.append(transform(self.dataset.load(index)))
                except UserError as error:
                    errors.append(str(error))
                    if len(set(errors)) > self.limit:
                        return None, None, errors
                    # the next one stands in, on every run alike
                    index = (index + 1) % len(self.dataset)
            labels.append(self.dataset.labels[index])
        return torch.from_numpy(np.stack(images)), torch.from_numpy(np.array(labels)), errors

    def stream(self, numbers, workers: int):
        """Yield (images, labels) for each of `numbers`, prepared ahead by `workers` processes of one thread each."""
        loader = torch.utils.data.DataLoader(
            self, batch_size=None, sampler=numbers, num_workers=workers, worker_init_fn=obey_only_the_parent,
            # By fork, whatever Python's default: workers then share the keys' memory and inherit the block below.
            multiprocessing_context="fork" if workers and sys.platform == "linux" else None,
            pin_memory=torch.cuda.is_available(),
            # or it draws from the global one and disturbs the training
            generator=torch.Generator())
        skipped = set()
        with stop_signals_blocked() if workers else contextlib.nullcontext():
            batches = iter(loader)
        for images, labels, errors in batches:
            for error in errors:
                if self.limit and error not in skipped:
                    print(f"skipped {error}", file=sys.stderr)
                skipped.add(error)
            if len(skipped) > self.limit:
                raise UserError(errors[-1] if not self.limit else
                                f"{len(skipped)} of {len(self.dataset)} images cannot be read, more than 1%; mend the data")
            yield images, labels


@functools.lru_cache(maxsize=2)
def permutation(n: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(n)


class ImageStream:
    """Training batches without end: iterate for (images uint8 (b, S, S, 3), labels int64 (b,)) of this rank.

    The order is one endless row of positions. Position p is image permutation(epoch p // n)[p % n], and step s takes the
    positions from s * batch_size on, cut into one piece per rank. So neither the number of ranks or workers nor a
    restart (start_step) changes which images a step sees, and a data set may be smaller than a batch.

    batch_size   images per step over all ranks
    skip_bad     the next image stands in for an unreadable one; above 1% of the data set (and one) it is a UserError
    Raises UserError with the first unreadable image's name unless skip_bad.
    """

    def __init__(self, dataset: ImageSet, image_size: int, batch_size: int, seed: int, flip: bool = False,
                 random_crop: bool = False, rank: int = 0, world: int = 1, start_step: int = 0, workers: int = 0,
                 skip_bad: bool = False):
        need(batch_size % world == 0, f"batch_size {batch_size} is not a multiple of the {world} processes; "
             f"try {max(1, batch_size // world) * world}")
        need(seed >= 0, f"seed {seed} is negative; give 0 or more")
        self.dataset, self.image_size, self.batch_size, self.seed = dataset, image_size, batch_size, seed
        self.flip, self.random_crop, self.rank, self.world = flip, random_crop, rank, world
        self.start_step, self.workers, self.skip_bad = start_step, workers, skip_bad

    def plan(self, step: int) -> list:
        n, share = len(self.dataset), self.batch_size // self.world
        first = step * self.batch_size + self.rank * share
        batch = []
        for position in range(first, first + share):
            epoch, place = divmod(position, n)
            index = int(permutation(n, self.seed, epoch)[place])
            batch.append((index, functools.partial(augment, size=self.image_size, key=(self.seed, epoch, index),
                                                   flip=self.flip, random_crop=self.random_crop)))
        return batch

    def __iter__(self):
        return Batches(self.dataset, self.plan, self.skip_bad).stream(itertools.count(self.start_step), self.workers)


def eval_plan(indices: np.ndarray, image_size: int, batch_size: int, number: int) -> list:
    transform = functools.partial(resize_crop, size=image_size)
    return [(int(index), transform) for index in indices[number * batch_size:(number + 1) * batch_size]]


def eval_batches(dataset: ImageSet, image_size: int, batch_size: int, indices=None, workers: int = 0,
                 skip_bad: bool = False):
    """Yield (images uint8 (b, S, S, 3), labels int64 (b,)) once, in order, cropped at the centre; the last may be short."""
    indices = np.arange(len(dataset)) if indices is None else np.asarray(indices)
    plan = functools.partial(eval_plan, indices, image_size, batch_size)
    yield from Batches(dataset, plan, skip_bad).stream(range(math.ceil(len(indices) / batch_size)), workers)


if __name__ == "__main__":
    from plumbing.datasets import open_images

    seven = open_images("shapes").subset(np.arange(7))
    print("Seven images, batches of four: an epoch ends in the middle of the second, and of the fourth.\n")
    print(f"{'':10}{'one process':16}two of them")
    for step in range(4):
        cells = [[index for index, _ in ImageStream(seven, 32, 4, seed=0, rank=rank, world=world).plan(step)]
                 for world in (1, 2) for rank in range(world)]
        print(f"step {step}    {str(cells[0]):16}{cells[1]} {cells[2]}")
    print("\nplan(step) needs no step before it, so a run that was killed goes on at any of them. What else would a")
    print("stream have to save that draws its next image from one running random generator?")
