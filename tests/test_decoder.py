"""Promises of decoder.py: any prefix is a picture, a code reaches all of it, patches lie right."""
import dataclasses
import itertools

import torch
import torch.nn.functional as F

from config import TokenizerConfig
from decoder import Decoder

CFG = TokenizerConfig(image_size=16, patch_size=4, token_schedule=(3, 7), code_dim=4,
                      codebook_size=16, decoder_width=32, decoder_depth=2, decoder_heads=2)
N = CFG.num_patches


def small(cfg=CFG) -> Decoder:
    torch.manual_seed(0)
    return Decoder(cfg)


def some_codes(length=3, batch=2):
    draw = torch.Generator().manual_seed(1)
    return F.normalize(torch.randn(batch, length, 4, generator=draw), dim=-1)


def by_patch(images):
    """(B, 3, 16, 16) -> (B, N, 48), patches in reading order."""
    corners = [(y, x) for y in range(0, 16, 4) for x in range(0, 16, 4)]
    return torch.stack([images[:, :, y:y + 4, x:x + 4].flatten(1) for y, x in corners], dim=1)


def changed_patches(before, after):
    """(N,) bool: which patches differ in any image."""
    return ((by_patch(before) - by_patch(after)).abs() > 1e-5).any(dim=2).any(dim=0)


@torch.no_grad()
def test_every_prefix_is_a_picture_and_growth_leaves_those_of_old_lengths_as_they_were():
    decoder, codes = small(), some_codes(7)
    before = [decoder(codes[:, :k]) for k in (1, 2, 3)]
    old = dict(decoder.named_parameters())
    decoder.grow(7)
    pictures = [decoder(codes[:, :k]) for k in range(1, 8)]
    assert all(map(torch.equal, pictures, before)), "of the first three lengths"
    assert all(picture.shape == (2, 3, 16, 16) for picture in pictures)
    for picture, longer in itertools.pairwise(pictures):
        assert (picture - longer).abs().max() > 1e-4, "each further code changes it"
    new = dict(decoder.named_parameters())
    assert all(new[name] is p for name, p in old.items())
    added = sum(p.numel() for name, p in new.items() if name not in old)
    assert added == 4 * CFG.decoder_width, "four new positions and nothing else"


@torch.no_grad()
def test_maps_beside_attention_start_silent():
    plain, both = small(), small(dataclasses.replace(CFG, decoder_reads="both"))
    both.load_state_dict(plain.state_dict(), strict=False)
    assert torch.equal(both(some_codes()), plain(some_codes()))
    both.grow(7)
    assert [tuple(maps.shape) for maps in both.code_to_patch] == [(3, 4, 16 * 32), (4, 4, 16 * 32)]
    assert not any(maps.any() for maps in both.code_to_patch)


@torch.no_grad()
def test_every_code_reaches_every_patch():
    decoder, codes = small(), some_codes()
    before = decoder(codes)
    for i in range(3):
        other = codes.clone()
        other[:, i] *= -1
        assert changed_patches(before, decoder(other)).all()


@torch.no_grad()
def test_the_place_of_a_code_matters():
    decoder, codes = small(), some_codes()
    assert changed_patches(decoder(codes), decoder(codes[:, [1, 0, 2]])).all()
    for table in decoder.code_pos:
        table.zero_()
    torch.testing.assert_close(decoder(codes), decoder(codes[:, [1, 0, 2]]))  # as they told it


@torch.no_grad()
def test_mask_token_n_paints_patch_n():
    decoder, codes = small(), some_codes()
    decoder.blocks = torch.nn.ModuleList()                    # no attention: nothing spreads
    before = decoder(codes)
    for n in range(N):
        decoder.mask_tokens[n] += torch.linspace(0, 1, CFG.decoder_width)
        after = decoder(codes)
        assert changed_patches(before, after).nonzero().flatten().tolist() == [n]
        before = after


@torch.no_grad()
def test_patches_differ_from_the_start_although_all_read_the_same_codes():
    patches = by_patch(small()(some_codes()))[0]
    assert torch.pdist(patches).min() > 0.01
