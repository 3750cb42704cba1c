"""The yardstick: how well does a PCA transform code do at a given number of bits?

How      project the images on the principal components of the training images; hand out the bits one by one, each to
         the component whose quantization error falls most; quantize each component with the levels that k-means in
         one dimension finds (Lloyd-Max). Every image gets the same number of bits, as a tokenizer's images do.
Run      python -m experiments.pca --data cifar10/train --val_data cifar10/test --bits 36 72 144
Prints   PSNR of the mean squared error over held-out images, in 8-bit RGB, the measure of train.py
"""
from plumbing.start import main_with_user_errors  # first: catches Ctrl-C from here on

import argparse

import numpy as np

from plumbing.batches import eval_batches
from plumbing.datasets import train_and_val


def pixels(dataset, size: int, limit: int) -> np.ndarray:
    """-> (n, size*size*3) float32 in [-1, 1], at most `limit` images, spread evenly over the data set."""
    indices = np.linspace(0, len(dataset) - 1, min(limit, len(dataset))).astype(int)
    return np.concatenate([x.numpy().reshape(len(x), -1) for x, _ in eval_batches(dataset, size, 500, indices)]).astype(np.float32) / 127.5 - 1


def lloyd(values: np.ndarray, levels: int, rounds: int = 30) -> np.ndarray:
    """The `levels` numbers that represent `values` (n,) with the least squared error, roughly; sorted."""
    centres = np.quantile(values, (np.arange(levels) + 0.5) / levels)
    for _ in range(rounds):
        nearest = np.searchsorted((centres[1:] + centres[:-1]) / 2, values)
        total, count = np.bincount(nearest, values, levels), np.bincount(nearest, minlength=levels)
        centres = np.sort(np.where(count > 0, total / np.maximum(count, 1), centres))
    return centres


def quantize(values: np.ndarray, centres: np.ndarray) -> np.ndarray:
    return centres[np.searchsorted((centres[1:] + centres[:-1]) / 2, values)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="training images, in any form that train.py takes")
    parser.add_argument("--val_data", default="", help="held-out images; empty: some of --data")
    parser.add_argument("--image_size", type=int, default=32)
    parser.add_argument("--bits", type=int, nargs="+", default=[36, 72, 144])
    args = parser.parse_args()
    train, val = train_and_val(args.data, args.val_data, 1000, 0)
    x, held_out = pixels(train, args.image_size, 20000), pixels(val, args.image_size, 10000)
    mean = x.mean(axis=0)
    _, basis = np.linalg.eigh(np.cov(x, rowvar=False))
    basis = basis[:, ::-1][:, :256]  # (pixels, components), the strongest first
    count = basis.shape[1]
    c, h = (x - mean) @ basis, (held_out - mean) @ basis
    errors = [[float((column ** 2).mean())] for column in c.T]                # [component][bits]

    def error(i: int, bits: int) -> float:
        while len(errors[i]) <= bits:
            errors[i].append(float(((c[:, i] - quantize(c[:, i], lloyd(c[:, i], 2 ** len(errors[i])))) ** 2).mean()))
        return errors[i][bits]
    given, done = np.zeros(count, int), 0
    for total in sorted(args.bits):
        while done < total:
            # The components come in order of strength, so the next silent one is the only silent candidate.
            candidates = range(min(np.count_nonzero(given) + 1, count))
            best = max(candidates, key=lambda i: error(i, given[i]) - error(i, given[i] + 1))
            given[best], done = given[best] + 1, done + 1
        coded = np.stack([quantize(h[:, i], lloyd(c[:, i], 2 ** given[i])) if given[i] else np.zeros(len(h)) for i in range(count)], axis=1)
        recon = (coded @ basis.T + mean).clip(-1, 1)
        print(f"{total:4} bits over {np.count_nonzero(given):3} components: {10 * np.log10(4 / ((recon - held_out) ** 2).mean()):.2f} dB")


if __name__ == "__main__":
    main_with_user_errors(main)
