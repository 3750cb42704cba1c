"""Promises of losses.py: every loss equals its formula, each gradient reaches whom it should."""
import math

import pytest
import torch

import losses


def pair(size: int = 32, batch: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    """Two different batches of images in [-1, 1]."""
    random = torch.Generator().manual_seed(0)
    return tuple(torch.rand(batch, 3, size, size, generator=random) * 2 - 1 for _ in range(2))


# ------------------------------------------------------------------------------------------------
# pixels

def test_reconstruction_is_the_mean_squared_error_in_float32_also_under_autocast():
    recon, images = (x.bfloat16() for x in pair())
    expected = (recon.float() - images.float()).square().mean()
    for half in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=half):
            assert losses.reconstruction(recon, images) == expected


@pytest.mark.parametrize("error, decibel", [(2.0, 0.0), (0.2, 20.0), (0.02, 40.0), (0.0, math.inf)])
def test_psnr_anchors(error, decibel):
    images = torch.full((1, 3, 8, 8), -1.0)
    assert losses.psnr(images + error, images).item() == pytest.approx(decibel, abs=1e-3)


def test_psnr_is_per_image_and_float32():
    recon, images = (x.bfloat16() for x in pair(batch=3))
    together = losses.psnr(recon, images)
    assert torch.equal(together, losses.psnr(recon.float(), images.float()))
    alone = [losses.psnr(recon[i:i + 1], images[i:i + 1]) for i in range(3)]
    assert torch.equal(together, torch.cat(alone))


def test_the_psnr_of_a_data_set_is_that_of_its_mean_error_not_the_mean_of_psnrs():
    images = torch.full((2, 3, 8, 8), -1.0)
    recon = images + torch.tensor([0.02, 0.2])[:, None, None, None]
    errors = losses.mse(recon, images)
    torch.testing.assert_close(errors, torch.tensor([0.0004, 0.04]))
    assert losses.to_db(errors.mean()).item() == pytest.approx(22.967, abs=1e-3)
    assert losses.psnr(recon, images).mean().item() == pytest.approx(30, abs=1e-3)
