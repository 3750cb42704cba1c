"""Promises of generator.py about drawing: from logits to tokens, and which tokens are masked."""
import math

import pytest
import torch

import generator as G


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_draws_follow_the_softmax(temperature):
    p = torch.tensor([0.5, 0.3, 0.15, 0.05])
    drawn = G.sample_from(p.log().expand(40000, 4), torch.Generator().manual_seed(0), temperature)
    expected = (p.log() / temperature).softmax(dim=0)
    assert (torch.bincount(drawn, minlength=4) / 40000 - expected).abs().max() < 0.01


def test_gumbel_noise_is_finite_even_where_rand_returns_0(monkeypatch):
    monkeypatch.setattr(torch, "rand", lambda *args, **kwargs: torch.tensor([0.0, 1 - 2 ** -24]))
    assert G.gumbel((2,), None, "cpu").isfinite().all()


def test_top_p_keeps_the_fewest_tokens_that_reach_it():
    logits = torch.tensor([[0.15, 0.5, 0.05, 0.3], [0.3, 0.05, 0.5, 0.15]]).log()
    for top_p, kept in ((0.01, 1), (0.49, 1), (0.51, 2), (0.79, 2), (0.81, 3), (0.96, 4)):
        out = G.top_k_top_p(logits, top_p=top_p)
        least = logits.topk(kept).values[:, -1:]
        expected = torch.where(logits >= least, logits, -math.inf)
        assert torch.equal(out, expected), top_p


def test_top_k_comes_first_and_top_p_counts_what_it_left():
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
    assert G.top_k_top_p(logits, top_k=3).isfinite().tolist() == [True, True, True, False]
    # Of 0.4 and 0.3 the first alone has 4/7 = 0.57 of what is left.
    kept = G.top_k_top_p(logits, top_k=2, top_p=0.5).isfinite()
    assert kept.tolist() == [True, False, False, False]
    assert G.top_k_top_p(logits, top_k=9).isfinite().all(), "more than there are"
    assert G.top_k_top_p(logits) is logits, "0 and 1 are off"


def test_gumbel_noise_is_drawn_where_the_generator_is_and_not_where_it_goes():
    there, here = torch.Generator().manual_seed(0), torch.Generator().manual_seed(0)
    assert G.gumbel((3, 4), there, "meta").device.type == "meta"
    G.gumbel((3, 4), here, "cpu")
    assert torch.equal(there.get_state(), here.get_state())


# ------------------------------------------------------------------------------------------------
# which tokens are masked

def test_masked_counts_follow_arccos():
    masked = G.random_masks(20000, 32)
    share = masked.float().mean(dim=1)
    assert share.min() >= 1 / 32, "at least one token"
    assert share.mean().item() == pytest.approx(2 / math.pi, abs=0.01)         # E[arccos(u)] = 1
    for x in (0.25, 0.5, 0.75):  # share > x  <=>  u < cos(x pi/2)
        x = x + 0.5 / 32  # between two counts
        expected = math.cos(x * math.pi / 2)
        assert (share > x).float().mean().item() == pytest.approx(expected, abs=0.015)
    assert (masked.float().mean(dim=0) - 2 / math.pi).abs().max() < 0.02, "all places alike"


def test_mask_schedule_is_the_arccos_curve_and_reveals_a_token_at_every_step():
    assert G.mask_schedule(32, 8) == [
        math.floor(32 * math.acos(s / 8) / (math.pi / 2)) for s in range(1, 9)]
    for length in range(1, 65):
        for steps in range(1, length + 1):
            masked = [length] + G.mask_schedule(length, steps)
            assert len(masked) == steps + 1 and masked[-1] == 0
            assert all(before > after for before, after in zip(masked, masked[1:]))
