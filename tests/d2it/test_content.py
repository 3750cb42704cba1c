"""The content transformer: what it may look at, what RefineNet may change, what it is without."""

import pytest
import torch
from torch import nn

from d2it import diffusion
from d2it.content import Content
from d2it.grain import grained_noise, spread
from d2it.presets import ContentConfig
from layers import patchify, unpatchify

CFG = ContentConfig(content_width=32, content_depth=2, refine_depth=2, content_heads=2,
                    grain_width=32, grain_depth=1, grain_heads=2)
n, C, CLASSES = 4, 4, 3


def network(cfg: ContentConfig = CFG, trained: bool = True, seed: int = 0) -> Content:
    """trained: the zeros of the initialisation are replaced, as training would."""
    torch.manual_seed(seed)
    model = Content(cfg, C, n, CLASSES).eval()
    if trained:
        for p in model.parameters():
            if not p.any():
                nn.init.normal_(p, std=0.2)
    return model


def inputs(B: int = 5, seed: int = 0):
    """z_t, t, labels, maps of every fullness: the first has none fine, the last has all fine."""
    g = torch.Generator().manual_seed(seed)
    grain = torch.rand(B, n, n, generator=g) < torch.linspace(0, 1, B)[:, None, None] * 1.01
    t = torch.randint(1, 1001, (B,), generator=g).float()
    labels = torch.randint(0, CLASSES + 1, (B,), generator=g)
    return grained_noise(grain, C, g), t, labels, grain


def test_at_first_the_output_is_zero_and_the_loss_the_mean_square_of_the_noise():
    model, (z, t, labels, grain) = network(trained=False), inputs(64)
    assert not model(z, t, labels, grain).any()
    assert diffusion.loss(model, z, labels, grain)[0].item() == pytest.approx(1, abs=0.05)


def test_coarse_cells_are_constant_and_the_same_bits_with_and_without_refinement():
    model, (z, t, labels, grain) = network(), inputs()
    rough, refined = model(z, t, labels, grain, refine=False), model(z, t, labels, grain)
    changed = (rough != refined).any(dim=1)
    assert torch.equal(changed, spread(grain[:, None])[:, 0])
    blocks = refined.view(5, C, n, 2, n, 2).transpose(3, 4).flatten(4)
    assert torch.equal((blocks == blocks[..., :1]).all(-1).all(1), ~grain)


def test_an_image_is_the_same_whatever_else_is_in_the_batch():
    model, (z, t, labels, grain) = network(), inputs()
    together = model(z, t, labels, grain)
    for i in range(len(z)):
        alone = model(z[i:i + 1], t[i:i + 1], labels[i:i + 1], grain[i:i + 1])
        assert torch.allclose(alone, together[i:i + 1], atol=1e-5), f"{grain[i].sum()} fine cells"


@pytest.mark.parametrize("share", ["none", "all", "mixed"])
def test_every_parameter_gets_a_finite_gradient_whatever_the_maps(share):
    model, (z, _, labels, grain) = network().train(), inputs()
    grain = {"none": torch.zeros_like(grain), "all": torch.ones_like(grain), "mixed": grain}[share]
    diffusion.loss(model, z, labels, grain)[0].backward()
    missing = [name for name, p in model.named_parameters() if p.grad is None]
    assert not missing
    assert all(p.grad.isfinite().all() for p in model.parameters())
    refined = any(p.grad.any() for p in model.refine.parameters())
    assert refined == (share != "none")


def test_refinement_reads_the_fine_codes_the_time_the_class_and_the_place():
    model, (z, t, labels, grain) = network(), inputs()

    def correction(z=z, t=t, labels=labels, model=model):
        return model(z, t, labels, grain) - model(z, t, labels, grain, refine=False)
    before = correction()
    assert not torch.allclose(correction(z=z + 0.5), before, atol=1e-4)
    assert not torch.allclose(correction(t=t / 2), before, atol=1e-4)
    assert not torch.allclose(correction(labels=(labels + 1) % 4), before, atol=1e-4)
    with torch.no_grad():
        model.refine.position[3] += torch.randn(4, 32)  # the last cell of the first row
    moved = (correction() - before).abs().amax(dim=1) > 1e-6
    inside = spread(grain[:, None])[:, 0]
    # Only images in which that cell is fine; there attention carries it everywhere.
    assert torch.equal(moved.flatten(1).any(1), grain[:, 0, 3]) and not moved[~inside].any()


def test_refinement_costs_as_many_tokens_as_there_are_fine_codes():
    model, (z, t, labels, grain) = network(), inputs()
    seen = []
    model.refine.blocks[0].register_forward_hook(lambda m, args, out: seen.append(out.shape))
    few = grain & (torch.arange(16).view(4, 4) < 3)
    model(z, t, labels, few)
    model(z, t, labels, torch.zeros_like(grain))
    assert [shape[1] for shape in seen] == [12, 4]


def test_labels_are_hidden_in_training_only():
    model, labels = network(), torch.zeros(1000).long()
    assert torch.equal(model.hide_labels(labels), labels)
    hidden = model.train().hide_labels(labels)
    assert 60 < (hidden == CLASSES).sum() < 140 and (hidden % CLASSES == 0).all()


def test_all_fine_and_without_refinement_it_is_a_dit_with_patches_of_two():
    cfg = ContentConfig(content_width=32, content_depth=2, refine_depth=0, content_heads=2,
                        grain_width=32, grain_depth=1, grain_heads=2)
    model, (z, t, labels, _) = network(cfg), inputs()

    def layer_norm(x):
        return torch.nn.functional.layer_norm(x, (32,), eps=1e-6)

    def dit(z):  # Peebles and Xie 2023, written out, with the weights of `model`
        c = model.time(t) + model.label(labels)
        x = model.embed(patchify(z, 2)) + model.position + model.grain_embed.weight[1]
        for b in model.blocks:
            s1, k1, g1, s2, k2, g2 = (v[:, None] for v in b.condition(c).chunk(6, dim=1))
            q, k, v = b.attention.qkv(layer_norm(x) * (1 + k1) + s1).chunk(3, dim=-1)
            q, k, v = (y.unflatten(-1, (2, 16)).transpose(1, 2) for y in (q, k, v))
            heads = (q @ k.transpose(-1, -2) / 4).softmax(-1) @ v
            x = x + g1 * b.attention.out(heads.transpose(1, 2).flatten(2))
            x = x + g2 * b.mlp(layer_norm(x) * (1 + k2) + s2)
        shift, scale = (v[:, None] for v in model.last.condition(c).chunk(2, dim=1))
        return unpatchify(model.fine_head(layer_norm(x) * (1 + scale) + shift), 2, 2 * n)

    fine = torch.ones(5, n, n, dtype=torch.bool)
    assert torch.allclose(model(z, t, labels, fine), dit(z), atol=1e-5)
