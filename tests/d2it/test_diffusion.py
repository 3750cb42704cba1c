"""Diffusion on codes: both paths, the loss by hand, and a sampler that is right for any network."""
import itertools
import math

import pytest
import torch

from d2it import diffusion as grained
from d2it.diffusion import guided, loss, sample
from d2it.grain import code_weights, grained_noise
from diffusion import KEPT, T, alpha_sigma, estimates, random_times, target, times
from helpers import refused

LABELS = torch.tensor([0, 1])
GRAIN = torch.tensor([[[True, False], [False, False]], [[True, True], [True, False]]])


def full(t, B: int = 2) -> torch.Tensor:
    return torch.full((B,), t)


def oracle(z, path: str):
    """A network that knows z."""
    def content(z_t, t, labels, grain):
        alpha, sigma = alpha_sigma(t, path)
        noise = (z_t - alpha * z) / sigma
        return target(z, noise, path)
    return content


def constant(value: float):
    return lambda z_t, t, labels, grain: torch.full_like(z_t, value)


def test_the_noise_path_is_dit_s_and_keeps_the_variance_and_the_flow_path_is_straight():
    assert KEPT[0] == 1 and KEPT[1] == pytest.approx(1 - 1e-4)
    assert KEPT[T].item() == pytest.approx(4.0358e-5, rel=1e-4)
    alpha, sigma = alpha_sigma(torch.arange(T + 1), "noise")
    assert torch.allclose(alpha.square() + sigma.square(), torch.ones(()), atol=1e-6)
    assert (alpha.flatten().diff() < 0).all() and (sigma.flatten().diff() > 0).all()
    alpha, sigma = alpha_sigma(torch.tensor([0.0, 250, 500, 1000]), "flow")
    assert alpha.flatten().tolist() == [1, 0.75, 0.5, 0] and torch.equal(sigma, 1 - alpha)


@pytest.mark.parametrize("path", ["noise", "flow"])
def test_with_a_network_that_knows_z_estimates_are_exact_and_any_number_of_steps_ends_there(path):
    z, noise = torch.randn(2, 4, 4, 4).double(), torch.randn(2, 4, 4, 4).double()
    for t in (1, 400, 999):
        alpha, sigma = (x.double() for x in alpha_sigma(full(t), path))
        z_t = alpha * z + sigma * noise
        z_hat, noise_hat = estimates(z_t, target(z, noise, path), full(t), path)
        assert torch.allclose(z_hat, z, atol=1e-4) and torch.allclose(noise_hat, noise, atol=1e-4)
    z, start = z.float(), grained_noise(GRAIN, 4)
    for steps in (1, 3, 50):
        got = sample(oracle(z, path), start, LABELS, GRAIN, 9, path, steps)
        # One step divides by alpha = 0.006, and what float32 rounded off with it.
        assert torch.allclose(got, z, atol=1e-4 if steps == 1 else 1e-5)


def test_on_the_flow_path_the_sampler_is_eulers_method():
    def content(z_t, t, labels, grain):
        return torch.sin(3 * z_t) + t.view(-1, 1, 1, 1) / T
    start = grained_noise(GRAIN, 4)
    z, grid = start, torch.linspace(1, 0, 11)
    for t, s in itertools.pairwise(grid):
        z = z + (s - t) * content(z, full(t.item() * T), LABELS, GRAIN)
    assert torch.allclose(sample(content, start, LABELS, GRAIN, 9, "flow", 10), z, atol=1e-5)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_for_gaussian_codes_the_exact_network_carries_noise_to_their_width(eta):
    s = 0.5  # z ~ N(0, s^2), so the best guess of z is known in closed form
    grain = torch.ones(1, 100, 100, dtype=torch.bool)

    def content(z_t, t, labels, grain):
        alpha, sigma = alpha_sigma(t, "noise")
        z_hat = z_t * alpha * s ** 2 / (alpha ** 2 * s ** 2 + sigma ** 2)
        return target(z_hat, (z_t - alpha * z_hat) / sigma, "noise")
    torch.manual_seed(0)
    start = grained_noise(grain, 1)
    z = sample(content, start, torch.zeros(1).long(), grain, 9, "noise", 400, eta=eta)
    assert z.std().item() == pytest.approx(s, rel=0.02)


def test_times_fall_strictly_from_noise_alone_to_clean():
    for steps in (1, 7, 50, 250, 1000):
        ladder = times(steps)
        assert ladder[0] == T and ladder[-1] == 0 and len(ladder) == steps + 1
        assert all(a > b for a, b in itertools.pairwise(ladder))
    for steps in (0, 1001):
        refused(times, steps, names=["1 to 1000"])


def test_training_times_cover_every_step_alike_and_never_leave_the_table(monkeypatch):
    torch.manual_seed(0)
    t = torch.stack([random_times(64, "noise") for _ in range(2000)])
    assert t.min() >= 1 and t.max() <= T and torch.equal(t, t.round())
    counts = torch.bincount(t.flatten().long(), minlength=T + 1)[1:]
    assert counts.min() > 80 and counts.max() < 180            # 128 on average
    assert (t.quantile(0.25, dim=1) - T / 4).abs().max() < 20, "a batch is spread evenly"
    monkeypatch.setattr(torch, "rand", lambda *shape, **kind: torch.full(shape, 1 - 2 ** -24))
    assert random_times(64, "noise").max() == T


def test_the_loss_is_the_mean_over_codes_as_computed_by_hand(monkeypatch):
    noise = grained_noise(GRAIN, 4, torch.Generator().manual_seed(0))
    monkeypatch.setattr(grained, "grained_noise", lambda grain, channels: noise)
    got, logs = loss(constant(0.3), torch.randn(2, 4, 4, 4), LABELS, GRAIN)
    total, count = 0.0, 0.0
    for b, i, j in itertools.product(range(2), range(4), range(4)):
        weight = 1 if GRAIN[b, i // 2, j // 2] else 0.25
        total += weight * ((0.3 - noise[b, :, i, j]) ** 2).sum().item()
        count += 4 * weight
    assert got.item() == pytest.approx(total / count, rel=1e-5)
    fine = ((0.3 - noise) ** 2).mean(1)[code_weights(GRAIN)[:, 0] == 1].mean().item()
    assert logs["fine"].item() == pytest.approx(fine, rel=1e-5)


def test_the_loss_logs_only_what_there_is():
    nothing = torch.zeros(4, 2, 2, dtype=torch.bool)
    _, logs = loss(constant(0.0), torch.randn(4, 4, 4, 4), torch.zeros(4).long(), nothing)
    assert set(logs) == {"coarse", "quarter_1", "quarter_2", "quarter_3", "quarter_4"}
    assert all(math.isfinite(value) for value in logs.values())


@pytest.mark.parametrize("batch, path", [(1, "noise"), (5, "noise"), (6, "flow")])
def test_an_error_is_logged_under_the_quarter_of_its_time_whatever_the_batch(batch, path):
    """The network is off by 1 in the first quarter of T, by 2 in the second, and so on."""
    grain, times_seen = torch.ones(batch, 2, 2, dtype=torch.bool), []
    z = torch.randn(batch, 4, 4, 4)

    def content(z_t, t, labels, grain):
        times_seen.extend(t.tolist())
        off = torch.tensor([math.ceil(4 * time / T) for time in t.tolist()])
        return oracle(z, path)(z_t.double(), t, labels, grain) + off.view(-1, 1, 1, 1)
    for _ in range(20):
        _, logs = loss(content, z.double(), torch.zeros(batch).long(), grain, path)
        found = {name: value.sqrt().item() for name, value in logs.items() if "quarter" in name}
        assert found == pytest.approx({name: float(name[-1]) for name in found}, rel=0.05)
    assert min(times_seen) < 250 and max(times_seen) > 750


def test_the_network_sees_z_mixed_with_grained_noise_at_its_time():
    seen = {}

    def content(z_t, t, labels, grain):
        seen.update(z_t=z_t, t=t)
        return torch.zeros_like(z_t)
    z = grained_noise(GRAIN, 4)
    loss(content, z, LABELS, GRAIN)
    alpha, sigma = alpha_sigma(seen["t"], "noise")
    noise = (seen["z_t"] - alpha * z) / sigma
    blocks = noise.view(2, 4, 2, 2, 2, 2).transpose(3, 4).flatten(4)
    same = ((blocks - blocks[..., :1]).abs() < 1e-4).all(-1).all(1)
    assert torch.equal(same, ~GRAIN)


def test_coarse_blocks_stay_constant_and_a_generators_state_says_all_also_with_eta():
    def draw(seed, eta=1.0):
        generator = torch.Generator().manual_seed(seed)
        start = grained_noise(GRAIN, 4, generator)
        return sample(lambda z_t, *_: torch.tanh(z_t),  # block by block, like the real one
                      start, LABELS, GRAIN, 9, "noise", 5, 1.0, eta, generator)
    for eta in (0.0, 0.5, 1.0):
        blocks = draw(0, eta).view(2, 4, 2, 2, 2, 2).transpose(3, 4).flatten(4)
        assert torch.equal((blocks == blocks[..., :1]).all(-1).all(1), ~GRAIN)
    assert torch.equal(draw(1), draw(1)) and not torch.equal(draw(1), draw(2))


def test_scale_0_is_unconditional_1_is_plain_and_every_channel_is_guided():
    def content(z_t, t, labels, grain):
        return labels.view(-1, 1, 1, 1) + z_t
    z = torch.randn(2, 4, 4, 4)
    for scale, shift in ((0, full(9)), (1, LABELS), (3, 9 + 3 * (LABELS - 9))):
        out = guided(content, z, full(5), LABELS, GRAIN, 9, scale)
        assert torch.allclose(out - z, shift.view(-1, 1, 1, 1).expand_as(z).float(), atol=1e-5)


def test_a_trace_holds_every_step_and_ends_before_the_result():
    trace = []
    z = torch.randn(2, 4, 4, 4)
    sample(oracle(z, "noise"), grained_noise(GRAIN, 4), LABELS, GRAIN, 9, "noise", 4, trace=trace)
    assert [t for t, _, _ in trace] == times(4)[:-1]
    assert all(torch.allclose(z_hat, z, atol=1e-4) for _, _, z_hat in trace[1:])


def test_settings_that_make_no_sense_are_refused():
    for path, eta in (("flow", 1.0), ("noise", 2.0)):
        refused(sample, constant(0), grained_noise(GRAIN, 4), LABELS, GRAIN, 9, path, 5, 1.0, eta,
                names=["eta"])
