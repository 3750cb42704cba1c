"""experiments/pca.py, the yardstick: quantizers as good as known ones, bits dealt out well."""

import numpy as np

from experiments import pca
from helpers import program, some_shapes



def test_levels_for_a_normal_variable_are_lloyd_and_maxs():
    """Max 1960, table I: mean squared error 0.3634 with 2 levels, 0.1175 with 4, 0.03454 with 8."""
    x = np.random.default_rng(0).standard_normal(200_000)
    for levels, error in ((2, 0.3634), (4, 0.1175), (8, 0.03454)):
        centres = pca.lloyd(x, levels, rounds=200)
        off = np.square(x - pca.quantize(x, centres)).mean()
        assert abs(off - error) < 0.02 * error
        assert np.allclose(centres, -centres[::-1], atol=0.03)


def test_every_value_gets_its_nearest_level():
    centres, x = np.array([-1.0, 0.2, 3.0]), np.linspace(-4, 6, 201)
    nearest = np.abs(x[:, None] - centres).argmin(axis=1)
    assert np.allclose(pca.quantize(x, centres), centres[nearest])


def test_more_bits_give_more_decibels_and_images_without_bits_are_their_mean(tmp_path):
    data = some_shapes(tmp_path / "shapes.npz", 400)
    done = program("-m", "experiments.pca", "--data", data, "--image_size", 8, "--bits", 4, 16, 64)
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.strip().splitlines()]
    assert [int(line[0]) for line in lines] == [4, 16, 64]
    psnr = [float(line[-2]) for line in lines]
    assert psnr[0] + 1 < psnr[1] and psnr[1] + 1 < psnr[2]
