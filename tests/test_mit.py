"""Promises of mit.py: every row knows the whole image, and where in it each patch lies."""
import torch

from config import TokenizerConfig
from mit import MIT

CFG = TokenizerConfig(image_size=16, patch_size=4, encoder_width=32, encoder_depth=2,
                      encoder_heads=2, expert_width=8, expert_heads=2)
N = CFG.num_patches


def small() -> MIT:
    torch.manual_seed(0)
    return MIT(CFG)


def some_images(batch=2):
    return torch.rand(batch, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1


def patch(images, n):
    """A view of patch n: (B, 3, 4, 4)."""
    return images[:, :, n // 4 * 4:n // 4 * 4 + 4, n % 4 * 4:n % 4 * 4 + 4]


@torch.no_grad()
def test_every_patch_reaches_every_row():
    mit, images = small(), some_images()
    before = mit(images)
    assert before.shape == (2, N, CFG.expert_width)
    for n in range(N):
        other = images.clone()
        patch(other, n).mul_(-1)
        assert ((mit(other) - before).abs().amax(dim=2) > 1e-4).all()


@torch.no_grad()
def test_rows_are_those_of_their_patches_and_only_positions_tell_the_order():
    mit, images, swapped = small(), some_images(), some_images()
    patch(swapped, 2).copy_(patch(images, 11))
    patch(swapped, 11).copy_(patch(images, 2))
    order = torch.arange(N)
    order[[2, 11]] = order[[11, 2]]
    assert (mit(swapped) - mit(images)[:, order]).abs().max() > 0.01
    mit.pos.zero_()
    torch.testing.assert_close(mit(swapped), mit(images)[:, order], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_rows_of_a_plain_image_differ_from_the_start():
    """Or every token would read the same mean patch until positions have been learned."""
    rows = small()(torch.zeros(1, 3, 16, 16))[0]
    assert torch.pdist(rows).min() > 0.1
