"""A moving picture of a run: what its decoder makes of 1, 2, ... L tokens.

    first row     held-out images, one of each class
    second row    the same images, decoded from the first k of their tokens
    third row     new images of these classes, each token drawn by the AR generator after those
                  before it
    bar below     k of L

In       a finished run of train.py with an AR generator
Run      python -m experiments.moving --run runs/demo --out moving.gif
Makes    a GIF with a frame for each k; the first and the last one stay longer
Exit     0 done, 1 failure, 2 user error
"""
from plumbing.start import main_with_user_errors  # first: catches Ctrl-C from here on

import os

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from config import CONFIGS
from generator import Generator
from nativetok import NativeTok, from_checkpoint
from plumbing import checkpoint
from plumbing.flags import Parser, need, number
from plumbing.images import to_float, to_uint8
from plumbing.outputs import need_places
from plumbing.processes import Processes, need_one_process
from plumbing.run import held_out, open_run

GIF = (".gif", b"GIF8")
MARGIN, BAR = 2, 4  # pixels, before enlargement
STEP, PAUSE = 220, 1800  # milliseconds
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


def frames(model: NativeTok, real: Tensor, new: Tensor) -> list[np.ndarray]:
    """real uint8 (n, H, W, 3), new ids (n, L) -> a picture for each k from 1 to L."""
    ids = model.encode(to_float(real.to(new.device)))                       # (n, L)
    L, pictures = model.num_tokens, []
    for k in range(1, L + 1):
        decoded = [to_uint8(model.decode(x[:, :k])).cpu() for x in (ids, new)]
        pictures.append(sheet([real, *decoded], k, L))
    return pictures


def write_gif(pictures: list[np.ndarray], path: str, scale: int) -> None:
    """Each picture has a palette of its own: 256 colours are few for all of them together."""
    big = [Image.fromarray(picture.repeat(scale, axis=0).repeat(scale, axis=1))
           .quantize(256, dither=Image.Dither.NONE) for picture in pictures]
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
    return parser.parse_args(argv)


def main(args) -> None:
    need_one_process("experiments.moving")
    need_places({"--out": (args.out, GIF)})
    device = Processes("auto").device
    run = open_run(args.run, CONFIGS)
    model = from_checkpoint(run.saved, os.path.join(args.run, "tokenizer.pt")).to(device)
    ar = Generator.of_run(args.run, "ar", model, device)
    pixels, labels = held_out(run)
    # One image of each class, of at most ten; one without labels shows its first image.
    shown = [int((labels == c).nonzero()[0]) for c in labels.unique()[:10]]
    need(shown, f"{run.val.name} has no held-out image; give train.py --val_data")
    new = ar.sample(labels[shown].to(device), cfg_scale=ar.default_cfg_scale,
                    generator=torch.Generator().manual_seed(0))
    write_gif(frames(model, pixels[shown], new), args.out, args.scale)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main_with_user_errors(lambda: main(parse()))
