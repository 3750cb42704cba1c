"""A moving picture of a run: what its decoder makes of 1, 2, ... L tokens.

    first row     held-out images, one of each class
    second row    the same images, decoded from the first k of their tokens
    third row     new images of these classes, each token drawn by the AR generator after those
                  before it
    bar below     k of L

In       a finished run of train.py with an AR generator
Run      python -m experiments.moving --run runs/demo --out moving.gif
Makes    a GIF with a frame for each k; the first and the last one stay longer. Where the run has a
         flow decoder, it draws all frames from one noise, so that a picture keeps what it has
Exit     0 done, 1 failure, 2 user error
"""
from plumbing.start import main_with_user_errors  # first: catches Ctrl-C from here on

import os
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from config import CONFIGS, GUIDANCE
from flow_decoder import Decoding
from generator import Generator
from nativetok import from_checkpoint
from plumbing import checkpoint
from plumbing.flags import Parser, number
from plumbing.images import to_float, to_uint8
from plumbing.outputs import need_places
from plumbing.processes import Processes, need_one_process
from plumbing.run import held_out, open_run
from plumbing.samples import add_decoder_flags

GIF = (".gif", b"GIF8")
MARGIN, BAR = 2, 4  # pixels, before enlargement
STEP, PAUSE = 220, 1800  # milliseconds
COLORS = 64  # of a frame; 256 make the file half as large again, and look the same
GRAY, BLUE, WHITE = (225, 225, 225), (60, 120, 220), 255


def sheet(rows: list[Tensor], k: int, L: int) -> np.ndarray:
    """Rows of uint8 images (n, H, W, 3), all of one n, above a bar of L places, k of them full."""
    n, H, W, _ = rows[0].shape
    height, width = MARGIN + len(rows) * (H + MARGIN), MARGIN + n * (W + MARGIN)
    picture = np.full((height + BAR + MARGIN, width, 3), WHITE, np.uint8)
    for r, row in enumerate(rows):
        for c, image in enumerate(row.numpy()):
            y, x = MARGIN + r * (H + MARGIN), MARGIN + c * (W + MARGIN)
            picture[y:y + H, x:x + W] = image
    edges = np.linspace(MARGIN, width, L + 1).round().astype(int)
    for i in range(L):
        picture[height:height + BAR, edges[i]:edges[i + 1] - 1] = BLUE if i < k else GRAY
    return picture


def frames(decode: Callable, real: Tensor, *ids: Tensor) -> list[np.ndarray]:
    """real uint8 (n, H, W, 3), and ids (n, L) for each row below it -> pictures for k = 1 .. L.

    decode   ids (n, k) -> images (n, 3, H, W)
    """
    L = ids[0].shape[1]
    return [sheet([real, *(to_uint8(decode(x[:, :k])).cpu() for x in ids)], k, L)
            for k in range(1, L + 1)]


def write_gif(pictures: list[np.ndarray], path: str, scale: int) -> None:
    """Each picture has a palette of its own: a few colours are enough for one, not for all."""
    big = [Image.fromarray(picture.repeat(scale, axis=0).repeat(scale, axis=1))
           .quantize(COLORS, dither=Image.Dither.NONE) for picture in pictures]
    times = [PAUSE // 2, *[STEP] * (len(big) - 2), PAUSE][-len(big):]
    with checkpoint.replacing(path) as file:
        big[0].save(file, format="GIF", save_all=True, append_images=big[1:], duration=times,
                    loop=0)


def parse(argv=None):
    parser = Parser(prog="moving.py", description=__doc__)
    parser.add_argument("--run", required=True, help="folder of a run of train.py")
    parser.add_argument("--out", required=True, metavar="FILE", help="the GIF to write")
    parser.add_argument("--scale", type=number(int, 1), default=2, metavar="N",
                        help="how many times the images are enlarged (default: 2)")
    add_decoder_flags(parser)
    parser.add_argument("--seed", type=number(int, 0), default=0, metavar="N",
                        help="of the new images, and of the flow decoder's noise (default: 0)")
    return parser.parse_args(argv)


def main(args) -> None:
    need_one_process("experiments.moving")
    need_places({"--out": (args.out, GIF)})
    device = Processes("auto").device
    run = open_run(args.run, CONFIGS)
    model = from_checkpoint(run.saved, os.path.join(args.run, "tokenizer.pt")).to(device)
    ar = Generator.of_run(args.run, "ar", model, device)
    decoding = Decoding.of_run(args.run, model, args.decoder, args.flow_steps)

    def decode(ids):
        return decoding(ids, torch.Generator().manual_seed(args.seed))
    pixels, labels = held_out(run)
    # One image of each class, of at most ten classes.
    shown = [int((labels == c).nonzero()[0]) for c in labels.unique()[:10]]
    ids = model.encode(to_float(pixels[shown].to(device)))                  # (n, L)
    new = ar.sample(labels[shown].to(device), cfg_scale=GUIDANCE,
                    generator=torch.Generator().manual_seed(args.seed))     # (n, L)
    write_gif(frames(decode, pixels[shown], ids, new), args.out, args.scale)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main_with_user_errors(lambda: main(parse()))
