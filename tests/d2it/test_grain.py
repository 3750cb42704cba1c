"""Grain maps: what scores as detail, whose map is whose, what a copied code may never become."""
import math

import pytest
import torch

from d2it.grain import (
    POLICIES, code_weights, count_codes, entropy, grain_map, grained_noise, gray, heat, kernel,
    merge, pack, painted, spread, threshold, unpack)
from helpers import shape_pixels

FLAT = math.log(255 * 0.01) + 0.5 * math.log(2 * math.pi * math.e)  # of a Gaussian 2.55 levels wide


def cells(levels) -> torch.Tensor:
    """Gray levels (B, H, W) -> pixels uint8 (B, H, W, 3)."""
    return torch.as_tensor(levels, dtype=torch.uint8)[..., None].expand(-1, -1, -1, 3)


def random_maps(B: int = 6, n: int = 4, seed: int = 0) -> torch.Tensor:
    """Maps of every fullness, none and all among them."""
    noise = torch.rand(B, n, n, generator=torch.Generator().manual_seed(seed))
    return noise < torch.linspace(0, 1, B)[:, None, None] * 1.01


def test_all_256_flat_cells_score_the_same_whatever_their_brightness():
    scores = entropy(cells(torch.arange(256).view(256, 1, 1).expand(256, 8, 8)), 8)
    assert scores.unique().numel() == 1
    assert abs(scores[0].item() - FLAT) < 1e-3


def test_two_far_levels_add_the_entropy_of_their_shares():
    for share in (1 / 64, 1 / 4, 1 / 2):
        one = torch.zeros(64)
        one[:round(64 * share)] = 255
        told = -share * math.log(share) - (1 - share) * math.log(1 - share)
        assert abs(entropy(cells(one.view(1, 8, 8)), 8).item() - FLAT - told) < 1e-3


def test_counting_levels_first_gives_the_papers_sum_over_pixels_to_the_bit():
    seed = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (100, 8, 8, 3), dtype=torch.uint8, generator=seed)
    level = gray(pixels).flatten(1).double() / 255
    bins = torch.arange(-20, 276).double() / 255
    p = torch.exp(-0.5 * ((level[..., None] - bins) / 0.01).square()).sum(dim=1)    # (100, 296)
    p = p / p.sum(dim=1, keepdim=True)
    assert torch.equal(entropy(pixels, 8).flatten(), -torch.xlogy(p, p).sum(dim=1).float())
    assert kernel().shape == (256, 296)


def test_a_change_in_one_cell_changes_the_score_of_that_cell_only():
    pixels = shape_pixels(1)
    before = entropy(pixels, 8)
    pixels[0, 8:16, 16:24] = torch.randint(0, 256, (8, 8, 3), dtype=torch.uint8)
    assert (before != entropy(pixels, 8)).nonzero().tolist() == [[0, 1, 2]]


def test_on_the_calibration_images_the_share_of_fine_cells_is_the_ratio():
    pixels = torch.randint(0, 256, (40, 32, 32, 3), dtype=torch.uint8)
    scores = entropy(pixels, 8)
    for ratio in (0, 0.25, 0.5, 1):
        limit = threshold(scores, ratio)
        # whatever the batch: calibration and run time are the same function
        fine = torch.cat([grain_map(part, 8, limit) for part in pixels.split(7)])
        missing = ratio * fine.numel() - fine.sum().item()
        assert 0 <= missing <= min(4, max(0, (scores == limit).sum().item() - 1))


def test_flat_cells_are_coarse_even_when_more_than_half_are_flat():
    pixels = torch.full((4, 32, 32, 3), 30, dtype=torch.uint8)
    pixels[1:, 16:] = 200
    pixels[0, :8, :8] = torch.randint(0, 256, (8, 8, 3), dtype=torch.uint8)
    fine = grain_map(pixels, 8, threshold(entropy(pixels, 8), 0.5))
    assert fine.nonzero().tolist() == [[0, 0, 0]]


def test_all_cells_are_fine_or_none_or_those_above_the_limit_whatever_the_batch():
    pixels = shape_pixels(20)
    maps = {policy: torch.cat([grain_map(part, 8, 2.5, policy) for part in pixels.split(3)])
            for policy in POLICIES}
    assert maps["fine"].all() and not maps["coarse"].any()
    assert torch.equal(maps["entropy"], entropy(pixels, 8) > 2.5)
    assert 0 < maps["entropy"].sum() < maps["entropy"].numel()


def test_merge_reads_nothing_of_the_grid_that_a_cell_does_not_belong_to():
    grain = random_maps()
    fine, coarse = torch.randn(6, 3, 8, 8), torch.randn(6, 3, 4, 4)
    merged, mask = merge(fine, coarse, grain), spread(grain[:, None])
    assert torch.equal(merged, merge(torch.where(mask, fine, 9.0), coarse, grain))
    assert torch.equal(merged, merge(fine, torch.where(grain[:, None], 9.0, coarse), grain))
    assert torch.equal(merge(fine, coarse, torch.ones_like(grain)), fine)
    assert torch.equal(merge(fine, coarse, torch.zeros_like(grain)), spread(coarse))


def blocks(z: torch.Tensor) -> torch.Tensor:
    """(B, C, 2n, 2n) -> (B, C, n, n, 4): the slots of each cell."""
    B, C, side, _ = z.shape
    return z.view(B, C, side // 2, 2, side // 2, 2).transpose(3, 4).flatten(4)


def test_codes_are_one_a_cell_and_three_more_if_fine_and_weights_count_them():
    grain = random_maps()
    assert torch.equal(count_codes(grain), 16 + 3 * grain.flatten(1).sum(1))
    assert torch.equal(code_weights(grain).flatten(1).sum(1), count_codes(grain).float())


def test_noise_is_one_draw_per_code_with_unit_variance_and_no_relation_between_codes():
    grain = random_maps(2000, 2)
    noise = grained_noise(grain, 4, torch.Generator().manual_seed(0))
    slots = blocks(noise)
    same = (slots == slots[..., :1]).all(dim=-1)              # (B, C, n, n)
    assert torch.equal(same, ~grain[:, None].expand_as(same))
    fine = noise[spread(grain[:, None]).expand_as(noise)]
    coarse = slots[~grain[:, None].expand_as(same)][:, 0]
    for mine in (fine, coarse):
        assert abs(mine.var().item() - 1) < 0.02 and abs(mine.mean().item()) < 0.02
    # neighbouring codes of one channel, and two channels of one code
    neighbours = torch.stack([slots[:, :, 0, 0, 0].flatten(), slots[:, :, 1, 1, 0].flatten()])
    channels = torch.stack([slots[:, 0, ..., 0].flatten(), slots[:, 1, ..., 0].flatten()])
    fine = slots[grain[:, None].expand_as(same)][:, :2].T
    for pair in (neighbours, channels, fine):
        assert abs(torch.corrcoef(pair)[0, 1].item()) < 0.03
    again, other = (grained_noise(grain, 4, torch.Generator().manual_seed(s)) for s in (0, 1))
    assert torch.equal(noise, again) and not torch.equal(noise, other)


@pytest.mark.parametrize("tail", [(), (5,), (4, 3)])
def test_unpack_undoes_pack_and_is_zero_where_it_is_coarse(tail):
    grain = random_maps()
    x = torch.randn(6, 16, *tail)
    packed, keep, index = pack(x, grain)
    mask = grain.flatten(1).view(6, 16, *[1] * len(tail))
    assert packed.shape[1] == grain.flatten(1).sum(1).max() and keep.sum() == grain.sum()
    assert torch.equal(unpack(packed, keep, index, 16), x * mask)


def test_pictures_show_fine_cells_red_and_coarse_ones_blue():
    pixels = torch.full((1, 32, 32, 3), 128, dtype=torch.uint8)
    grain = torch.zeros(1, 4, 4, dtype=torch.bool)
    grain[0, 0, 1] = True
    picture = painted(pixels, grain).int()
    assert picture[0, 4, 12, 0] > picture[0, 4, 12, 2] and picture[0, 4, 4, 2] > picture[0, 4, 4, 0]
    shown = heat(torch.tensor([[[2.355, 5.0], [3.0, 9.0]]]), 32)
    assert shown.shape == (1, 32, 32, 3) and shown[0, 0, 0, 0] == 0 and shown[0, 0, 31, 0] == 255
