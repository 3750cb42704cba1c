"""A training program whose noise follows from step and row, for test_loop.py.

python tests/same_noise.py train|d2it.train ARGS

A batch then has the same noise, however it is cut into micro-batches and processes.
"""
import importlib
import os
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch

import config
import flow_decoder
import generator
import loop
from d2it import content, diffusion, dvae, presets
from nativetok import doubling
from plumbing import run
from plumbing.start import main_with_user_errors

name, *words = sys.argv[1:]
program = importlib.import_module(name)
args = (presets if name == "d2it.train" else config).parse_run("", words)
rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
pieces, calls = args.train.accumulate, Counter()
run.EVAL_IMAGES = 20
generator.LABEL_DROPOUT = content.LABEL_DROPOUT = 0


def by_row(module, function: str, one_row) -> None:
    """Call module.function row by row, each with its own random numbers.

    one_row   (i, arguments) -> the arguments for row i alone, or None: this call is left as it is
    """
    original, key = getattr(module, function), (module.__name__, function)

    def drawn(*arguments):
        if one_row(0, *arguments) is None:
            return original(*arguments)
        batch = arguments[0] if isinstance(arguments[0], int) else len(arguments[0])
        step, piece = divmod(calls[key], pieces)
        calls[key] += 1
        first = ((step * world + rank) * pieces + piece) * batch
        rows = []
        with torch.random.fork_rng(devices=[]):
            for i in range(batch):
                torch.manual_seed(first + i)
                rows.append(original(*one_row(i, *arguments)))
        return torch.cat(rows)
    setattr(module, function, drawn)


def noise_of_row(i, grain, channels, noise=None):
    return None if noise else (grain[i:i + 1], channels)


by_row(generator, "random_masks", lambda i, batch, *more: (1, *more))
by_row(diffusion, "random_times", lambda i, batch, *more: (1, *more))
by_row(diffusion, "grained_noise", noise_of_row)
by_row(dvae, "grained_noise", noise_of_row)
by_row(flow_decoder, "random_times", lambda i, batch, *more: (1, *more))
by_row(flow_decoder, "image_noise", lambda i, images: (images[i:i + 1],))


def same_length(L: int) -> int:
    """Another one in each step, the same in all micro-batches and processes."""
    step, lengths = calls["length"] // pieces, doubling(L)
    calls["length"] += 1
    return lengths[step % len(lengths)]


flow_decoder.prefix_length = same_length


def over(self, batches, original=loop.Loop.over):
    calls.clear()
    return original(self, batches)


loop.Loop.over = over

if __name__ == "__main__":
    main_with_user_errors(lambda: program.main(args))
