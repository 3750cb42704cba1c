"""The Dynamic VAE: one code stays one number, is counted once and measured once."""
from dataclasses import replace

import numpy as np
import pytest
import torch

from d2it.dvae import DVAE, Codes, fingerprint, kl
from d2it.grain import code_weights, spread
from d2it.presets import DVAEConfig
from helpers import refused, shape_pixels
from loop import learning_rate, new_optimizer
from losses import to_db
from plumbing import checkpoint
from plumbing.flags import as_dict
from plumbing.images import to_float

CFG = DVAEConfig(image_size=32, dvae_width=8, dvae_mults=(1, 2, 2, 4), dvae_blocks=1)


@pytest.fixture
def model() -> DVAE:
    torch.manual_seed(0)
    return DVAE(CFG)


@pytest.fixture(scope="module")
def pixels() -> torch.Tensor:
    return shape_pixels(64)


def calibrated(model, pixels):
    model.calibrate(model.entropy(pixels))
    return model


def slots(z: torch.Tensor) -> torch.Tensor:
    """(B, C, 2n, 2n) -> (B, n, n, C, 4)."""
    B, C, side, _ = z.shape
    return z.view(B, C, side // 2, 2, side // 2, 2).permute(0, 2, 4, 1, 3, 5).flatten(4)


def test_coarse_blocks_are_constant_in_the_posterior_and_in_every_sample_of_it(model, pixels):
    grain = calibrated(model, pixels).grain_of(pixels)
    mean, logvar = model.moments(to_float(pixels), grain)
    codes = model.encode(pixels)
    assert torch.equal(codes.grain, grain) and grain.any() and not grain.all()
    for z in (mean, logvar, model.draw(mean, logvar, grain), codes.z):
        constant = (slots(z) == slots(z)[..., :1]).all(-1).all(-1)            # (B, n, n)
        assert torch.equal(constant, ~grain)


def test_a_coarse_code_follows_from_its_own_head_and_a_fine_one_from_the_other(model, pixels):
    grain, images = calibrated(model, pixels).grain_of(pixels), to_float(pixels)
    before = model.moments(images, grain)[0]
    with torch.no_grad():
        model.encoder.coarse[-1][-1].bias += 1.0
    moved = model.moments(images, grain)[0] - before
    inside = spread(grain[:, None]).expand_as(moved)
    assert torch.allclose(moved[~inside], torch.tensor(1.0), atol=1e-5) and not moved[inside].any()


def test_kl_is_that_of_torch_counted_once_per_code(model, pixels):
    pixels = pixels[:8]
    grain = calibrated(model, pixels).grain_of(pixels)
    mean, logvar = model.moments(to_float(pixels), grain)
    normal = torch.distributions.Normal(mean, (0.5 * logvar).exp())
    told = torch.distributions.kl_divergence(normal, torch.distributions.Normal(0.0, 1.0))
    assert torch.allclose(kl(mean, logvar), told, atol=1e-5)
    # by hand: every code of every image by itself
    cells, total, count = slots(told), 0.0, 0
    for b, i, j in np.ndindex(8, 4, 4):
        own = cells[b, i, j] if grain[b, i, j] else cells[b, i, j][:, :1]     # (C, 4 or 1)
        total, count = total + own.sum().item(), count + own.numel()
    assert model(to_float(pixels), grain)[1].item() == pytest.approx(total / count, rel=1e-5)


def test_standardised_codes_have_mean_0_and_std_1_in_each_channel_and_grain(model, pixels):
    calibrated(model, pixels)
    with torch.no_grad():
        model.encoder.coarse[-1][-1].bias[:4] += 50.0  # or the grains would hardly differ
    torch.manual_seed(1)
    model.measure(pixels.split(16))
    torch.manual_seed(1)
    parts = [model.encode(part) for part in pixels.split(16)]
    z, grain = torch.cat([p.z for p in parts]), torch.cat([p.grain for p in parts])
    for fine in (True, False):
        own = slots(z)[grain == fine]                         # (cells, C, 4)
        own = own.transpose(1, 2).reshape(-1, 4) if fine else own[..., 0]
        assert torch.allclose(own.mean(0), torch.zeros(4), atol=1e-3)
        assert torch.allclose(own.std(0, correction=0), torch.ones(4), atol=1e-4)


def test_a_grain_that_never_occurs_keeps_mean_0_and_std_1(model, pixels):
    model.limit.fill_(100.0)  # all coarse
    model.measure([pixels])
    assert torch.equal(model.latent_mean[1], torch.zeros(4))
    assert torch.equal(model.latent_std[1], torch.ones(4))
    assert model.encode(pixels).z.isfinite().all()


def test_decoding_undoes_the_standardising_and_reads_z_only(model, pixels):
    calibrated(model, pixels).measure([pixels])
    grain = model.grain_of(pixels)
    mean, _ = model.moments(to_float(pixels), grain)
    z = model.standardised(mean, grain)
    assert torch.allclose(model.standardised(z, grain, back=True), mean, atol=1e-4)
    assert torch.allclose(model.decode(Codes(z, grain)), model.decoder(mean), atol=1e-4)
    # the same latent under another map is the same image
    everything = torch.ones_like(grain)
    other = model.standardised(mean, everything)
    assert torch.allclose(model.decode(Codes(other, everything)), model.decoder(mean), atol=1e-4)


def test_the_decoder_can_tell_the_corners_of_a_copied_code_apart(model):
    with torch.no_grad():
        model.decoder.corner.normal_()
    model.decoder.body = torch.nn.Identity()
    told = slots(model.decoder(torch.zeros(1, 4, 8, 8)))[0]   # (n, n, width, 4), of equal codes
    assert torch.equal(told, told[:1, :1].expand_as(told)), "every cell is told the same"
    assert all(not torch.equal(told[..., a], told[..., b]) for a in range(4) for b in range(a))


def test_encoding_twice_draws_twice_and_a_generator_repeats(model, pixels):
    calibrated(model, pixels)
    first, second, a, b = (
        model.encode(pixels[:2], generator).z
        for generator in (None, None, *(torch.Generator().manual_seed(3) for _ in range(2))))
    assert not torch.equal(first, second) and torch.equal(a, b)


def test_a_checkpoint_brings_back_weights_threshold_statistics_and_fingerprint(
        model, pixels, tmp_path):
    calibrated(model, pixels).measure([pixels])
    content = {"dvae_config": as_dict(CFG), "ema": model.state_dict()}
    checkpoint.save(tmp_path / "dvae.pt", content)
    again = DVAE.load(tmp_path / "dvae.pt")
    assert again.fingerprint == fingerprint(model) and not again.training
    assert torch.equal(again.grain_of(pixels), model.grain_of(pixels))
    assert torch.equal(again.latent_std, model.latent_std)
    for change in (again.limit, again.latent_mean, again.decoder.corner.data):
        before = fingerprint(again)
        change += 1
        assert fingerprint(again) != before


def test_a_dvae_from_when_the_cell_size_was_a_setting_is_the_same_one(model, tmp_path):
    old = {**as_dict(CFG), "cell_size": 8}
    checkpoint.save(tmp_path / "dvae.pt", {"dvae_config": old, "ema": model.state_dict()})
    known = checkpoint.fingerprint(model.state_dict(), old)
    assert DVAE.load(tmp_path / "dvae.pt").fingerprint == fingerprint(model) == known


def test_images_of_another_size_and_files_of_another_kind_are_refused(model, tmp_path):
    refused(model.grain_of, torch.zeros(1, 64, 64, 3, dtype=torch.uint8), names=["64", "32"])
    checkpoint.save(tmp_path / "x.pt", {"ema": {}})
    refused(DVAE.load, tmp_path / "x.pt", names=["holds no DVAE"])


@pytest.mark.parametrize("policy,codes", [("coarse", 16), ("fine", 64)])
def test_the_ends_of_the_scale_are_ordinary_autoencoders(policy, codes, pixels):
    cfg = DVAEConfig(**{**as_dict(CFG), "dvae_mults": (1, 2, 2, 4), "grain_policy": policy})
    model = calibrated(DVAE(cfg), pixels)
    grain = model.grain_of(pixels)
    assert code_weights(grain)[0].sum() == codes
    recon, divergence = model(to_float(pixels[:2]), grain[:2])
    (recon.mean() + divergence).backward()
    unused = model.encoder.fine if policy == "coarse" else model.encoder.coarse
    assert all(not p.grad.any() for p in unused.parameters())


@pytest.mark.parametrize("width, n, steps, rate, dB", [
    (8, 2, 60, 8e-3, 20),
    pytest.param(16, 8, 500, 4e-3, 30, marks=pytest.mark.faults)])  # half a minute
def test_a_few_images_are_learned_by_heart(width, n, steps, rate, dB, pixels):
    torch.manual_seed(0)
    model, few = DVAE(replace(CFG, dvae_width=width)), pixels[:n]
    grain, images = calibrated(model, few).grain_of(few), to_float(few)
    optimizer = new_optimizer(model, "adamw", 0.0, 0.99)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, rate, 0.0, 10)
        recon, divergence = model(images, grain)
        loss = (recon - images).square().mean()
        (loss + 1e-6 * divergence).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert to_db(loss).item() > dB
