"""Batches in an order that nothing disturbs: no number of processes or workers, no restart.

In       an ImageSet
Out      images uint8 (b, S, S, 3) and labels int64 (b,); images.to_float makes the models' input

    ImageSet ─► load(i) ─► augment      ─► ImageStream     training: endless, shuffled every epoch
                      └──► resize_crop  ─► eval_batches    evaluation: in order, once

Differs  the paper leaves the order open. Here the images of a step are computed from its number; no
         state runs along that could be lost
Try      python -m plumbing.batches      (one process, two, and a restart: the same at every step)
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
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from plumbing.datasets import ImageSet
from plumbing.flags import UserError, need
from plumbing.images import augment, resize_crop
from plumbing.start import stop_signals

TIMEOUT = 600  # seconds to wait for a batch of the data workers
POLL = 1  # seconds after which one that has died is noticed while a batch is waited for
SHARED = "/dev/shm"  # where Linux keeps what processes share
MEND_SHARED = ("give it more (docker run --shm-size=8g), or use --workers 0 or a smaller "
               "--batch_size")
SKIP_BAD = " (train.py --skip_bad passes over up to 1% of bad ones)"


class ImagesFailed(UserError):
    """Images cannot be had: a bad file, a data worker that died. All that was learned is sound."""


# ------------------------------------------------------------------------------------------------
# data workers

@contextlib.contextmanager
def starting_workers():
    """Processes started inside inherit a block of signals; for this one, they come at the end.

    TRAP: DataLoader tells of a worker that has died from a handler of SIGCHLD, so out of any line,
    in the middle of a step or of saving, and nobody knows what is sound after that. Its handler is
    taken back; wait_for() hears of deaths at a moment that is known.
    """
    number = getattr(signal, "SIGCHLD", None)  # Windows has none
    if threading.current_thread() is not threading.main_thread():
        number = None  # DataLoader sets no handler then
    handler = signal.getsignal(number) if number else None
    can_block = hasattr(signal, "pthread_sigmask")  # Windows cannot
    before = signal.pthread_sigmask(signal.SIG_BLOCK, stop_signals()) if can_block else None
    try:
        yield
    finally:
        if number:
            signal.signal(number, handler or signal.SIG_DFL)
        if can_block:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


def obey_only_the_parent(worker: int) -> None:
    """In a worker: a signal to the whole process group must not stop it before all is saved.

    TRAP: a worker that simply ignores SIGTERM also ignores the main process, which at its exit
    would wait for ever.
    """
    def listen():
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != multiprocessing.parent_process().pid:
            pass
        os._exit(0)

    def report(kind, error, trace):
        # Errors of images travel with their batch. What comes here is the thread that hands tensors
        # over, when the main process has left in the middle of it: nobody waits for them any more.
        if not issubclass(kind, (OSError, EOFError)):
            sys.__excepthook__(kind, error, trace)

    sys.excepthook = report
    if not hasattr(signal, "pthread_sigmask"):  # Windows, where only Ctrl-C reaches a whole group
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, stop_signals())
    if hasattr(signal, "sigwaitinfo"):  # a Mac has none
        threading.Thread(target=listen, daemon=True).start()


def way_to_start_workers() -> str:
    """By fork, whatever Python's default: workers share the keys' memory and inherit the block of
    signals. Windows cannot fork, and a Mac's libraries do not survive it.
    """
    return "fork" if sys.platform == "linux" else "spawn"


def need_shared_memory(workers: int, batch_bytes: int) -> None:
    """Raise UserError when the batches that workers prepare ahead do not fit into shared memory.

    DataLoader lets each prepare two, and one that finds no room would never be heard of again.
    """
    if not workers or not os.path.isdir(SHARED):
        return
    processes = int(os.environ.get("LOCAL_WORLD_SIZE") or 1)
    batches, free = 2 * workers * processes, shared_memory_free()
    need(batches * batch_bytes <= free,
         f"{workers * processes} data workers prepare {batches} batches of {batch_bytes / 1e6:.1f} "
         f"MB in shared memory, and {SHARED} has {free / 1e6:.1f} MB free; {MEND_SHARED}")


def shared_memory_free() -> int:
    found = os.statvfs(SHARED)
    return found.f_bavail * found.f_frsize


# ------------------------------------------------------------------------------------------------
# batches by number

class Batches:
    """Batches by number, as DataLoader's map-style data set.

    plan          number -> [(index, transform)], the images of that batch
    batch_bytes   what the images of one batch take
    skip_bad      None: the program has no such flag, and nobody is advised to give it
    """

    def __init__(self, dataset: ImageSet, plan: Callable, batch_bytes: int, skip_bad: bool | None):
        self.dataset, self.plan, self.batch_bytes = dataset, plan, batch_bytes
        # unreadable images to put up with
        self.limit = max(1, len(dataset) // 100) if skip_bad else 0
        self.advice = SKIP_BAD if skip_bad is False else ""

    def __getitem__(self, number: int) -> tuple[Tensor | None, Tensor | None, list[str], str]:
        """images uint8 (b, S, S, 3), labels int64 (b,), unreadable images, failure.

        No images when more are unreadable than the limit allows, or when there is a failure.
        Both travel as text: DataLoader would wrap a worker's exception into pages of traceback.
        """
        images, labels, errors = [], [], []
        in_worker = torch.utils.data.get_worker_info() is not None  # each would keep its own
        for index, transform in self.plan(number):
            while len(images) == len(labels):  # until one more image has been read
                try:
                    images.append(transform(self.dataset.load(index, not in_worker)))
                except UserError as error:
                    errors.append(str(error))
                    if len(set(errors)) > self.limit:
                        return None, None, errors, ""
                    # the next one stands in, on every run alike
                    index = (index + 1) % len(self.dataset)
            labels.append(self.dataset.labels[index])
        batch = torch.from_numpy(np.stack(images)), torch.from_numpy(np.array(labels))
        if in_worker:
            try:
                # Here and not on the way to the main process, where a failure would be lost.
                batch = batch[0].share_memory_(), batch[1].share_memory_()
            except RuntimeError as error:
                reason = str(error).splitlines()[0]
                return None, None, errors, f"no shared memory for a batch ({reason}); {MEND_SHARED}"
        return *batch, errors, ""

    def stream(self, numbers, workers: int, timeout: int = TIMEOUT):
        """Yield (images, labels) for each of `numbers`.

        workers   processes of one thread each that prepare them ahead
        timeout   seconds to wait for a batch of theirs, or ImagesFailed
        """
        need_shared_memory(workers, self.batch_bytes)
        loader = torch.utils.data.DataLoader(
            self, batch_size=None, sampler=numbers, num_workers=workers,
            worker_init_fn=obey_only_the_parent, timeout=min(POLL, timeout) if workers else 0,
            multiprocessing_context=way_to_start_workers() if workers else None,
            pin_memory=torch.cuda.is_available(),
            # or it draws from the global one and disturbs the training
            generator=torch.Generator())
        skipped = set()
        with starting_workers() if workers else contextlib.nullcontext():
            batches = iter(loader)
        try:
            while True:
                batch = wait_for(batches, workers, timeout)
                if batch is None:
                    return
                images, labels, errors, failure = batch
                if failure:
                    raise ImagesFailed(failure)
                for error in errors:
                    if self.limit and error not in skipped:
                        print(f"skipped {error}", file=sys.stderr)
                    skipped.add(error)
                if len(skipped) > self.limit:
                    raise ImagesFailed(
                        errors[-1] + self.advice if not self.limit else
                        f"{len(skipped)} of {len(self.dataset)} images cannot be read, "
                        "more than 1%; mend the data")
                yield images, labels
        finally:
            # Now, so that its workers are told to end. An error that holds this frame would leave
            # it to the garbage collector, which takes their queues first and waits 5 s for each.
            del batches


def wait_for(batches, workers: int, timeout: int):
    """The next of DataLoader's batches, or None at their end.

    ImagesFailed when none comes in time, or never, since a worker has died.
    """
    began = time.monotonic()
    while True:
        try:
            return next(batches, None)
        except RuntimeError as error:
            reason = str(error).splitlines()[0] if str(error) else ""
            if reason.startswith("DataLoader worker"):
                raise ImagesFailed(f"a data worker died ({reason}); is memory short? "
                                   "lower --workers") from None
            if "DataLoader timed out" not in reason:
                raise
        # The next call goes on waiting for the same batch.
        if time.monotonic() - began >= timeout:
            raise ImagesFailed(
                f"no batch came from {workers} data workers in {timeout} seconds; is the disk that "
                f"slow, or {SHARED} full? {MEND_SHARED}, or raise --timeout")


# ------------------------------------------------------------------------------------------------
# training

@functools.lru_cache(maxsize=2)
def permutation(n: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(n)


def shown(n: int, batch_size: int, seed: int, rank: int, world: int,
          step: int) -> tuple[np.ndarray, np.ndarray]:
    """Which of n images a rank sees in a step -> int64 (b,) epochs, (b,) indices.

    The order is one endless row of positions. Position p is image permutation(epoch p // n)[p % n],
    and step s takes the positions from s * batch_size on, cut into one piece per rank. So neither
    the number of ranks or workers nor a restart changes which images a step sees, and a data set
    may be smaller than a batch.
    """
    share = batch_size // world
    epochs, places = np.divmod(step * batch_size + rank * share + np.arange(share), n)
    # of one epoch, or of several when it ends within the batch
    parts = [permutation(n, seed, epoch)[places[epochs == epoch]]
             for epoch in np.unique(epochs).tolist()]
    return epochs, np.concatenate(parts)


class ImageStream:
    """Training batches without end: iterate for (images uint8 (b, S, S, 3), labels int64 (b,)).

    The order is that of shown().

    batch_size   images per step over all ranks
    skip_bad     the next image stands in for an unreadable one; above 1% of the data set (and one)
                 it is a UserError. None: like False, where there is no such flag
    timeout      seconds to wait for a batch of the workers
    Raises ImagesFailed with the first unreadable image's name unless skip_bad.
    """

    def __init__(self, dataset: ImageSet, image_size: int, batch_size: int, seed: int,
                 flip: bool = False, random_crop: bool = False, rank: int = 0, world: int = 1,
                 start_step: int = 0, workers: int = 0, skip_bad: bool | None = None,
                 timeout: int = TIMEOUT):
        need(batch_size % world == 0, f"batch_size {batch_size} is not a multiple of the {world} "
             f"processes; try {max(1, batch_size // world) * world}")
        need(seed >= 0, f"seed {seed} is negative; give 0 or more")
        self.dataset, self.image_size, self.batch_size = dataset, image_size, batch_size
        self.seed, self.flip, self.random_crop = seed, flip, random_crop
        self.rank, self.world, self.start_step = rank, world, start_step
        self.workers, self.skip_bad, self.timeout = workers, skip_bad, timeout

    def plan(self, step: int) -> list:
        plan = []
        epochs, indices = shown(len(self.dataset), self.batch_size, self.seed, self.rank,
                                self.world, step)
        for epoch, index in zip(epochs.tolist(), indices.tolist()):
            transform = functools.partial(augment, size=self.image_size,
                                          key=(self.seed, epoch, index),
                                          flip=self.flip, random_crop=self.random_crop)
            plan.append((index, transform))
        return plan

    def __iter__(self):
        batch_bytes = self.batch_size // self.world * self.image_size ** 2 * 3
        batches = Batches(self.dataset, self.plan, batch_bytes, self.skip_bad)
        return batches.stream(itertools.count(self.start_step), self.workers, self.timeout)


# ------------------------------------------------------------------------------------------------
# evaluation

def eval_plan(indices: np.ndarray, image_size: int, batch_size: int, number: int) -> list:
    transform = functools.partial(resize_crop, size=image_size)
    chosen = indices[number * batch_size:(number + 1) * batch_size]
    return [(int(index), transform) for index in chosen]


def eval_batches(dataset: ImageSet, image_size: int, batch_size: int, indices=None,
                 workers: int = 0, skip_bad: bool | None = None, timeout: int = TIMEOUT):
    """Yield (images uint8 (b, S, S, 3), labels int64 (b,)) once, in order, cropped at the centre.

    The last batch may be short; skip_bad and timeout are those of ImageStream.
    """
    indices = np.arange(len(dataset)) if indices is None else np.asarray(indices)
    plan = functools.partial(eval_plan, indices, image_size, batch_size)
    batch_bytes = min(batch_size, len(indices)) * image_size ** 2 * 3
    numbers = range(math.ceil(len(indices) / batch_size))
    yield from Batches(dataset, plan, batch_bytes, skip_bad).stream(numbers, workers, timeout)


if __name__ == "__main__":
    from plumbing.datasets import open_images

    seven = open_images("shapes").subset(np.arange(7))
    print("Seven images, batches of four: an epoch ends in the middle of the second, and of the "
          "fourth.\n")
    print(f"{'':10}{'one process':16}two of them")
    for step in range(4):
        cells = []
        for rank, world in ((0, 1), (0, 2), (1, 2)):
            stream = ImageStream(seven, 32, 4, seed=0, rank=rank, world=world)
            cells.append([index for index, _ in stream.plan(step)])
        print(f"step {step}    {str(cells[0]):16}{cells[1]} {cells[2]}")
    print("\nplan(step) needs no step before it, so a run that was killed goes on at any of them.")
    print("What else would a stream have to save that draws its next image from one running random "
          "generator?")
