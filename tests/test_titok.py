"""Promises of titok.py: who sees whom in the two baselines, and that a token is a token."""
import pytest
import torch

from config import TokenizerConfig
from helpers import refused
from quantizer import VectorQuantizer
from titok import TiTok

L, N = 5, 16
KINDS = pytest.mark.parametrize("kind", ["titok", "titok-causal"])


def small(kind, schedule=(L,)) -> tuple[TiTok, VectorQuantizer]:
    cfg = TokenizerConfig(tokenizer=kind, image_size=16, patch_size=4, encoder_width=32,
                          encoder_depth=2, encoder_heads=2, token_schedule=schedule,
                          codebook_size=64, code_dim=4)
    torch.manual_seed(0)
    return TiTok(cfg).eval(), VectorQuantizer(cfg).eval()


def some_images(batch=3):
    return torch.rand(batch, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1


@torch.no_grad()
def look_inside(titok, quantizer, images):
    """-> z (B, L, d) before quantization, and the patches behind the last block (B, N, D)."""
    patches = []
    hook = titok.blocks[-1].register_forward_hook(
        lambda module, args, out: patches.append(out[:, :N]))
    quantizer.train().bypass = True
    z = titok(images, quantizer)[0]
    hook.remove()
    quantizer.eval().bypass = False
    return z, patches[0]


def change_each_latent(kind):
    """For each latent j that is replaced: j, (L,) bool which z changed, bool did patches."""
    titok, quantizer = small(kind)
    z, patches = look_inside(titok, quantizer, some_images())
    for j in range(L):
        kept = titok.latents.data[j].clone()
        titok.latents.data[j] = torch.randn(32)
        other, other_patches = look_inside(titok, quantizer, some_images())
        titok.latents.data[j] = kept
        changed = (other != z).flatten(2).any(dim=2).any(dim=0).tolist()
        yield j, changed, not torch.equal(other_patches, patches)


def test_unordered_every_latent_influences_every_other_and_all_patches():
    for _, changed, patches_changed in change_each_latent("titok"):
        assert changed == [True] * L and patches_changed


def test_causal_latent_j_leaves_all_before_it_and_all_patches_unchanged_to_the_bit():
    for j, changed, patches_changed in change_each_latent("titok-causal"):
        assert changed == [False] * j + [True] * (L - j) and not patches_changed


@torch.no_grad()
def test_permuting_the_latents_permutes_the_ids_so_tokens_are_not_mixed_with_channels():
    titok, quantizer = small("titok")
    z_q, ids, losses = titok(some_images(8), quantizer)
    assert ids.unique(dim=1).shape[1] == L, "different tokens, or this would show nothing"
    order = torch.tensor([3, 0, 4, 1, 2])
    titok.latents.copy_(titok.latents[order])
    moved_z_q, moved_ids, moved_losses = titok(some_images(8), quantizer)
    assert torch.equal(moved_ids, ids[:, order])
    torch.testing.assert_close(moved_z_q, z_q[:, order])
    torch.testing.assert_close(moved_losses, losses)


@KINDS
@torch.no_grad()
def test_every_patch_reaches_every_token(kind):
    titok, quantizer = small(kind)
    z, _ = look_inside(titok, quantizer, some_images())
    for n in range(N):
        other = some_images()
        y, x = n // 4 * 4, n % 4 * 4
        other[:, :, y:y + 4, x:x + 4] *= -1
        assert ((look_inside(titok, quantizer, other)[0] - z).abs().amax(dim=2) > 1e-4).all()


@KINDS
@torch.no_grad()
def test_the_place_of_a_patch_matters(kind):
    model, turned = small(kind), some_images().flip(2)
    change = look_inside(*model, turned)[0] - look_inside(*model, some_images())[0]
    assert change.abs().max() > 0.1


@KINDS
def test_several_lengths_are_refused_with_the_one_to_give(kind):
    refused(small, kind, (3, 9), names=["no experts to grow", "--token_schedule 9"])
