"""Promises of losses.py: every loss equals its formula, each gradient reaches whom it should."""
import math
import sys
from types import SimpleNamespace
from urllib.error import URLError

import pytest
import torch
from torch import nn

import losses
from helpers import ranks, refused


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


def test_psnr_of_8_bit_rounding_is_59_dB():
    images = pair(64)[0]
    rounded = ((images + 1) * 127.5).round() / 127.5 - 1
    assert losses.psnr(rounded, images).mean().item() == pytest.approx(58.92, abs=0.1)


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


# ------------------------------------------------------------------------------------------------
# perception

class Spy(nn.Module):
    """A classifier of two numbers per image that remembers what it was shown."""

    def __init__(self):
        super().__init__()
        self.dropout = nn.Dropout(0.5)
        self.linear = nn.Linear(3, 2)
        self.seen = []

    def forward(self, x):
        self.seen.append(x)
        return self.linear(self.dropout(x).mean((2, 3)))


def test_perceptual_is_the_squared_error_of_the_logits_in_float32_also_under_autocast():
    spy = Spy()
    loss = losses.Perceptual(spy)
    expected = loss(*pair())
    logits = [spy.linear(x.mean((2, 3))) for x in spy.seen]
    assert expected == (logits[0] - logits[1]).square().mean() > 0
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert loss(*pair()) == expected


def test_perceptual_is_zero_for_equal_images_even_after_train():
    images = pair()[0]
    loss = losses.Perceptual(Spy())
    assert loss.train()(images, images) == 0      # dropout would make the two differ
    assert nn.ModuleList([loss]).train()[0](images, images) == 0


def test_perceptual_gradient_reaches_the_reconstruction_only():
    recon, images = (x.requires_grad_() for x in pair())
    loss = losses.Perceptual(Spy())
    loss(recon, images).backward()
    assert recon.grad.abs().sum() > 0
    assert images.grad is None
    assert all(p.grad is None and not p.requires_grad for p in loss.parameters())


def test_the_classifier_sees_224_pixels_normalised_as_for_imagenet():
    for value in (-1.0, 0.5):
        spy = Spy()
        images = torch.full((1, 3, 32, 32), value)
        losses.Perceptual(spy)(images, images)
        for x in spy.seen:
            assert x.shape == (1, 3, 224, 224) and x.dtype == torch.float32
            mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])
            expected = ((value + 1) / 2 - mean) / std
            torch.testing.assert_close(x[0], expected[:, None, None].expand(3, 224, 224))


def test_a_large_image_is_smoothed_before_it_is_shrunk():
    stripes = torch.ones(1, 3, 672, 672)
    stripes[..., ::3] = -1  # every third column black: 2/3 white on average
    spy = Spy()
    losses.Perceptual(spy)(stripes, stripes)
    gray = spy.seen[0][0, 0] * 0.229 + 0.485
    assert (gray - 2 / 3).abs().max() < 0.12         # without smoothing all black or all white


def test_missing_torchvision_is_one_line_that_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    monkeypatch.setitem(sys.modules, "torchvision.models", None)
    refused(losses.Perceptual, names=["pip install torchvision"])


@pytest.mark.parametrize("failure", [URLError("no network"), RuntimeError("invalid hash value"),
                                     EOFError()])
def test_unreachable_weights_are_one_line_that_says_what_to_put_where(monkeypatch, failure):
    def convnext_small(weights):
        raise failure
    weights = SimpleNamespace(IMAGENET1K_V1=SimpleNamespace(url="https://example.org/small.pth"))
    models = SimpleNamespace(convnext_small=convnext_small, ConvNeXt_Small_Weights=weights)
    monkeypatch.setitem(sys.modules, "torchvision", SimpleNamespace(models=models))
    monkeypatch.setitem(sys.modules, "torchvision.models", models)
    refused(losses.Perceptual, names=["put https://example.org/small.pth into", "checkpoints"])


# ------------------------------------------------------------------------------------------------
# adversary

def test_discriminator_gives_a_grid_of_logits_and_refuses_images_that_are_too_small():
    discriminator = losses.Discriminator(width=16)
    for size, verdicts in ((24, 1), (32, 2), (128, 14)):
        logits = discriminator(torch.zeros(2, 3, size, size))
        assert logits.shape == (2, 1, verdicts, verdicts)
    refused(discriminator, torch.zeros(1, 3, 16, 16), names=["24 pixels or more, not 16"])


def test_an_inner_patch_of_70_pixels_decides_each_verdict():
    # Group normalisation looks at the whole image, so it is left out.
    layers = losses.Discriminator(width=16).layers
    layers = nn.Sequential(*(layer for layer in layers if not isinstance(layer, nn.GroupNorm)))
    images = torch.zeros(1, 3, 128, 128, requires_grad=True)
    layers(images)[0, 0, 7, 7].backward()
    rows = images.grad[0].abs().sum((0, 2)).nonzero()
    assert rows.max() - rows.min() + 1 == 70


def test_at_weight_1_the_adversary_pulls_as_hard_as_the_pixel_error():
    torch.manual_seed(0)
    adversary = losses.Adversary(1e-4, torch.device("cpu"))
    images, recon = torch.rand(2, 3, 32, 32), torch.rand(2, 3, 32, 32, requires_grad=True)
    for factor in (1.0, 100.0):  # whatever the scale of the discriminator's verdicts
        with torch.no_grad():
            list(adversary.net.parameters())[-2].mul_(factor)
        error = losses.reconstruction(recon, images)
        pixels, = torch.autograd.grad(error, recon, retain_graph=True)
        own, = torch.autograd.grad(adversary.judge(recon, error), recon)
        assert own.norm().item() == pytest.approx(pixels.norm().item(), rel=1e-4)


def test_the_discriminator_judges_each_image_alone_and_has_no_running_state():
    discriminator, images = losses.Discriminator(width=16), pair(batch=4)[0]
    together = discriminator(images)
    assert not list(discriminator.buffers())
    torch.testing.assert_close(together[:1], discriminator(images[:1]))
    assert torch.equal(discriminator.eval()(images), together)


@pytest.mark.parametrize("real, fake, expected", [
    (0, 0, 1), (1, -1, 0), (9, -9, 0), (-1, 1, 2), (0.5, -1, 0.25),
    ([3, -1], [-3, 1], 1)])  # of each verdict: the means 1 and -1 would give 0
def test_hinge_anchors_of_the_discriminator(real, fake, expected):
    real, fake = torch.tensor(real).float(), torch.tensor(fake).float()
    assert losses.discriminator_loss(real, fake) == expected


def test_generator_loss_is_minus_the_mean_logit():
    logits = torch.tensor([1., 2., 6.], requires_grad=True)
    loss = losses.generator_loss(logits)
    loss.backward()
    assert loss == -3
    torch.testing.assert_close(logits.grad, torch.full((3,), -1 / 3))      # and never saturates


def test_lecam_equals_its_formula():
    lecam = losses.LeCam()
    lecam.real_anchor.fill_(0.5)
    lecam.fake_anchor.fill_(-0.25)
    loss = lecam(torch.tensor([1., 2.]), torch.tensor([-1., -2.]))
    assert loss == (1.5 + 0.25) ** 2 + (0.5 + 1.5) ** 2
    assert lecam(torch.tensor([-1.]), torch.tensor([1.])) == 0             # nothing to hold back
    assert lecam(torch.tensor([math.nan]), torch.tensor([1.])).isnan()
    assert lecam.real_anchor == 0.5, "a step that is skipped leaves no trace in the anchors"


def test_lecam_anchors_are_moving_averages_that_a_checkpoint_holds():
    lecam = losses.LeCam(decay=0.9)
    for _ in range(2):
        lecam.update(torch.tensor([1., 3.]), torch.tensor([-1.]))
    expected = {"real_anchor": 2 * (1 - 0.9 ** 2), "fake_anchor": -(1 - 0.9 ** 2)}
    assert {k: v.item() for k, v in lecam.state_dict().items()} == pytest.approx(expected)
    assert losses.LeCam().decay == 0.999


def test_lecam_pulls_the_logits_and_not_the_anchors():
    lecam = losses.LeCam()
    real, fake = torch.tensor([2.], requires_grad=True), torch.tensor([-3.], requires_grad=True)
    loss = lecam(real, fake)
    lecam.update(real, fake)  # before backward, on purpose
    loss.backward()
    assert real.grad == 4 and fake.grad == -6                              # 2 * 2, and -2 * 3
    assert not lecam.real_anchor.requires_grad


TWO_RANKS = """
import torch, torch.distributed as dist, losses
dist.init_process_group("gloo")
rank = dist.get_rank()
lecam = losses.LeCam(decay=0.5)
lecam.update(torch.tensor([1. + rank]), torch.tensor([-4. * rank]))
print(lecam.real_anchor.item(), lecam.fake_anchor.item())
dist.destroy_process_group()
"""


def test_lecam_anchors_are_averaged_over_ranks():
    # The last line: some versions of gloo say that they are connected, on stdout.
    assert [rank.stdout.splitlines()[-1] for rank in ranks(2, "-c", TWO_RANKS)] == ["0.75 -1.0"] * 2


def test_the_discriminator_learns_from_all_micro_batches_of_a_step_and_of_no_other():
    """LeCam looks at each micro-batch by itself, so it is left out."""
    torch.manual_seed(0)
    images, recon = torch.rand(4, 3, 32, 32), torch.rand(4, 3, 32, 32)

    def gradients(pieces, *seen):
        torch.manual_seed(1)
        adversary = losses.Adversary(1e-4, torch.device("cpu"), pieces)
        adversary.lecam.forward = lambda real, fake: 0 * real.mean()
        for part in seen:
            adversary.see(images[part], recon[part])
        adversary.learn()
        assert not adversary.seen
        return torch.cat([p.grad.flatten() for p in adversary.net.parameters()])
    first, second = slice(0, 2), slice(2, 4)
    whole = gradients(1, slice(0, 4))
    torch.testing.assert_close(gradients(2, first, second), whole, rtol=1e-3, atol=1e-6)
    after_a_skipped_step = gradients(2, second, second, first, second)
    torch.testing.assert_close(after_a_skipped_step, whole, rtol=1e-3, atol=1e-6)
    assert not torch.allclose(gradients(1, second), whole, rtol=1e-2)
