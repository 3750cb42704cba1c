"""A reference for tokenizers: how well does a PCA transform code do at a given number of bits?

The images are projected on the principal components of the training images. The bits are handed
out one by one, each to the component whose quantization error falls most; a component is quantized
with the levels that k-means in one dimension finds (Lloyd-Max). Every image gets the same number of
bits, as a tokenizer's images do.

Run      python -m experiments.pca --data cifar10/train --val_data cifar10/test --bits 36 72 144
Makes    a line for each number of bits: PSNR of the mean squared error over held-out images, in
         8-bit RGB, the measure of train.py
"""
from plumbing.start import main_with_user_errors  # first: catches Ctrl-C from here on

import argparse
from collections.abc import Iterator

import numpy as np

from plumbing.batches import eval_batches
from plumbing.datasets import ImageSet, train_and_val
from plumbing.flags import Parser, number

COMPONENTS = 256  # at most; the others are too weak to get any bits


def pixels(dataset: ImageSet, size: int, limit: int) -> np.ndarray:
    """-> (n, size*size*3) float32 in [-1, 1], at most `limit` images, spread evenly."""
    indices = np.linspace(0, len(dataset) - 1, min(limit, len(dataset))).astype(int)
    batches = [x.numpy().reshape(len(x), -1) for x, _ in eval_batches(dataset, size, 500, indices)]
    return np.concatenate(batches).astype(np.float32) / 127.5 - 1


def lloyd(values: np.ndarray, levels: int) -> np.ndarray:
    """The `levels` numbers that represent `values` (n,) with the least squared error; sorted.

    Roughly: a fixed number of rounds of k-means, from quantiles on.
    """
    centres = np.quantile(values, (np.arange(levels) + 0.5) / levels)
    for _ in range(30):
        nearest = np.searchsorted((centres[1:] + centres[:-1]) / 2, values)
        total = np.bincount(nearest, values, levels)
        count = np.bincount(nearest, minlength=levels)
        centres = np.sort(np.where(count > 0, total / np.maximum(count, 1), centres))
    return centres


def quantize(values: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """Each value's nearest centre."""
    return centres[np.searchsorted((centres[1:] + centres[:-1]) / 2, values)]


class Component:
    """One principal component: the training images' coordinates along it, and their quantizers."""

    def __init__(self, coordinates: np.ndarray):
        self.coordinates, self.bits = coordinates, 0
        # errors[b]: mean squared error with b bits; without any, all that is left is the mean, 0
        self.errors = [float((coordinates ** 2).mean())]

    def error(self, bits: int) -> float:
        while len(self.errors) <= bits:
            recon = self.quantized(self.coordinates, len(self.errors))
            self.errors.append(float(((self.coordinates - recon) ** 2).mean()))
        return self.errors[bits]

    def gain(self) -> float:
        """By how much one more bit would lower the error."""
        return self.error(self.bits) - self.error(self.bits + 1)

    def quantized(self, values: np.ndarray, bits: int) -> np.ndarray:
        if bits == 0:
            return np.zeros(len(values))
        return quantize(values, lloyd(self.coordinates, 2 ** bits))


def transform_code(train: ImageSet, val: ImageSet, image_size: int,
                   bits: list[int]) -> Iterator[tuple[int, int, float]]:
    """-> for each number of bits: it, how many components got some, PSNR in dB on `val`."""
    x, held_out = pixels(train, image_size, 20000), pixels(val, image_size, 10000)
    mean = x.mean(axis=0)
    _, basis = np.linalg.eigh(np.cov(x, rowvar=False))
    # (pixels, components), the strongest first
    basis = basis[:, ::-1][:, :COMPONENTS]
    components = [Component(column) for column in ((x - mean) @ basis).T]
    coordinates = (held_out - mean) @ basis                                   # (n, components)

    given = 0
    for total in sorted(bits):
        while given < total:
            # The components come in order of strength, so the next one without bits is the only
            # such candidate.
            used = sum(component.bits > 0 for component in components)
            best = max(components[:used + 1], key=Component.gain)
            best.bits += 1
            given += 1
        coded = np.stack([component.quantized(values, component.bits)
                          for component, values in zip(components, coordinates.T)], axis=1)
        recon = (coded @ basis.T + mean).clip(-1, 1)
        psnr = 10 * np.log10(4 / ((recon - held_out) ** 2).mean())
        yield total, sum(component.bits > 0 for component in components), float(psnr)


def parse() -> argparse.Namespace:
    parser = Parser(prog="python -m experiments.pca", description=__doc__)
    parser.add_argument("--data", required=True,
                        help="training images, in any form that train.py takes")
    parser.add_argument("--val_data", default="", help="held-out images; empty: some of --data")
    parser.add_argument("--image_size", type=number(int, 1, 2 ** 14), default=32, metavar="N",
                        help="crop and resize to this (default: 32)")
    parser.add_argument("--bits", type=number(int, 1, 10000), nargs="+", default=[36, 72, 144],
                        metavar="N", help="of an image (default: 36 72 144)")
    return parser.parse_args()


def main() -> None:
    args = parse()
    train, val = train_and_val(args.data, args.val_data, 1000, 0)
    for bits, components, psnr in transform_code(train, val, args.image_size, args.bits):
        print(f"{bits:4} bits over {components:3} components: {psnr:.2f} dB", flush=True)


if __name__ == "__main__":
    main_with_user_errors(main)
