"""Built-in images [ours]: ten shapes in a few colours, sizes and places. Nothing is downloaded.

In       a number from 0 to TOTAL - 1: shape, colour, background, size, row, column are its digits
Out      draw_shape(number)   uint8 (32, 32, 3), the same bytes on every machine: integers only
         shape_of(number)     its label, an index into SHAPES
         numbers(part)        which are for training ("train") and which are held out ("val"): a
                              seeded permutation splits them, so the two never coincide
Try      python -m plumbing.shapes      (draws shapes.png)
"""
import functools
import math

import numpy as np

SHAPES = {  # is (x, y), seen from the centre with y downwards, inside the shape of radius r?
    "disc": lambda x, y, r: x * x + y * y <= r * r,
    "ring": lambda x, y, r: ((x * x + y * y <= r * r)
                             & (25 * (x * x + y * y) >= 9 * r * r)),
    "square": lambda x, y, r: np.maximum(abs(x), abs(y)) <= r,
    "triangle": lambda x, y, r: (abs(y) <= r) & (2 * abs(x) <= y + r),
    "plus": lambda x, y, r: ((np.maximum(abs(x), abs(y)) <= r)
                             & (4 * np.minimum(abs(x), abs(y)) <= r)),
    "cross": lambda x, y, r: ((np.maximum(abs(x), abs(y)) <= r)
                              & (5 * abs(abs(x) - abs(y)) <= 2 * r)),
    "bar": lambda x, y, r: (abs(x) <= r) & (3 * abs(y) <= r),
    "pillar": lambda x, y, r: (abs(y) <= r) & (3 * abs(x) <= r),
    "diamond": lambda x, y, r: abs(x) + abs(y) <= r,
    "crescent": lambda x, y, r: ((x * x + y * y <= r * r)
                                 & (25 * x * x + (5 * y + 3 * r) ** 2 >= 16 * r * r)),
}
COLOURS = {"red": (240, 70, 55), "yellow": (255, 205, 50), "blue": (80, 160, 255)}
BACKGROUNDS = {"black": (20, 20, 24), "forest": (12, 64, 44)}
# In eighths of a pixel, of 32. The places are half a pixel off the middle: no mirrored image is
# another image.
RADII = (68, 80, 92)
PLACES = (92, 108, 124, 140, 156)
DIGITS = (len(SHAPES), len(COLOURS), len(BACKGROUNDS), len(RADII), len(PLACES), len(PLACES))
TOTAL, HELD_OUT = math.prod(DIGITS), 500


@functools.cache
def coverage(shape: int, size: int, row: int, column: int) -> np.ndarray:
    """How many of the 4x4 points in each pixel lie inside: int (32, 32), 0 to 16."""
    point = 2 * np.arange(128) + 1
    x, y = point[None, :] - PLACES[column], point[:, None] - PLACES[row]
    inside = list(SHAPES.values())[shape](x, y, RADII[size])  # (128, 128)
    return inside.reshape(32, 4, 32, 4).sum(axis=(1, 3))


@functools.cache
def draw_shape(number: int) -> np.ndarray:
    """0 <= number < TOTAL -> uint8 (32, 32, 3), read-only; drawn once: all are 14 MB."""
    shape, colour, background, size, row, column = np.unravel_index(number, DIGITS)
    front, back = list(COLOURS.values())[colour], list(BACKGROUNDS.values())[background]
    covered = np.arange(17)[:, None]  # sixteenths of a pixel
    mixed = (np.array(front) * covered + np.array(back) * (16 - covered) + 8) // 16  # (17, 3)
    image = mixed.astype(np.uint8)[coverage(shape, size, row, column)]
    image.flags.writeable = False
    return image


def shape_of(number):
    """One number or an array of them -> the labels."""
    return np.unravel_index(number, DIGITS)[0]


def numbers(part: str) -> np.ndarray:
    """The numbers of the training images (part "train") or of the held-out ones ("val"), int64."""
    order = np.random.default_rng(0).permutation(TOTAL)
    return order[-HELD_OUT:] if part == "val" else order[:-HELD_OUT]


def main() -> None:
    """Draws shapes.png where one stands."""
    from plumbing.images import save_grid

    train = numbers("train")
    rows = [train[shape_of(train) == k][:12] for k in range(len(SHAPES))]  # one row per class
    images = np.stack([draw_shape(number) for number in np.concatenate(rows)])
    save_grid(images, "shapes.png", columns=12, scale=2)
    print(f"shapes.png: {', '.join(SHAPES)}, twelve of each")
    pixels, bits = draw_shape(0).size * 8, math.log2(TOTAL)
    print(f"\nThere are {TOTAL:,} such images: {bits:.1f} bits (the log2) name one of them, "
          f"its pixels take {pixels:,} bits.")
    print("A token of a codebook of 512 carries 9 bits. How few tokens could say everything, "
          "and in which order?")


if __name__ == "__main__":
    from plumbing.start import main_with_user_errors

    main_with_user_errors(main)
