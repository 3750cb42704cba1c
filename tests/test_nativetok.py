"""Promises of nativetok.py: parts fit together, nothing leaves a trace, growth keeps every id."""
import dataclasses
import itertools

import pytest
import torch
import torch.nn.functional as F

from config import TokenizerConfig
from helpers import refused, same_content
from losses import psnr
from nativetok import NativeTok
from plumbing import checkpoint
from plumbing.flags import as_dict

CFG = TokenizerConfig(
    image_size=16, patch_size=4, encoder_width=32, encoder_depth=1, encoder_heads=2,
    expert_width=32, expert_depth=1, expert_heads=2, token_schedule=(2, 4, 6), codebook_size=32,
    code_dim=4, decoder_width=32, decoder_depth=1, decoder_heads=2)
KINDS = {
    "native-query": dict(),
    "native-block": dict(expert="block", expert_depth=2),
    "titok": dict(tokenizer="titok", token_schedule=(6,)),
    "titok-causal": dict(tokenizer="titok-causal", token_schedule=(6,)),
}
KIND = pytest.mark.parametrize("kind", KINDS)
FORMS = pytest.mark.parametrize("kind", ["native-query", "native-block"])


def small(kind="native-query", **settings) -> NativeTok:
    torch.manual_seed(0)
    return NativeTok(dataclasses.replace(CFG, **{**KINDS[kind], **settings})).eval()


def some_images(batch=8):
    """Smooth images without a common structure, (B, 3, 16, 16) in [-1, 1]."""
    coarse = torch.rand(batch, 3, 3, 3, generator=torch.Generator().manual_seed(1)) * 2 - 1
    return F.interpolate(coarse, size=16, mode="bicubic", align_corners=True).clamp(-1, 1)


# ------------------------------------------------------------------------------------------------
# the whole learns

@pytest.mark.parametrize("kind", [
    "native-query", "titok-causal",
    *(pytest.param(kind, marks=pytest.mark.faults) for kind in ("native-block", "titok"))])
def test_one_batch_overfits_through_its_ids(kind):
    model, images = small(kind, token_schedule=(3,), patch_size=8), some_images()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.99))
    model.train().quantizer.bypass = True
    for step in range(200):
        if step == 50:
            model.quantizer.draw_codebook(model.quantizer.recent)
            model.quantizer.bypass = False
        recon, _, losses = model(images)
        loss = (recon - images).square().mean() + losses["codebook"] + 0.25 * losses["commitment"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    mean_image = psnr(images.mean(dim=0).expand_as(images), images).mean()
    ids = model.encode(images)
    assert psnr(model.decode(ids), images).mean() > mean_image + 6
    another = model.decode(ids.roll(1, dims=0))
    assert psnr(another, images).mean() < mean_image, "of another image's ids"


@KIND
def test_all_but_the_position_of_the_last_token_which_nobody_reads_learn_at_every_step(kind):
    """With continuous codes and with dropped tails too. Under bf16 autocast images stay float32."""
    model = small(kind, tail_drop=1.0).grow_to(6).train()
    for continuous, half in itertools.product((True, False), (True, False)):
        model.quantizer.bypass = continuous
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            recon, _, losses = model(some_images())
            assert recon.dtype == model.decode(model.encode(some_images())).dtype == torch.float32
            loss = recon.square().mean() + losses["codebook"] + losses["commitment"]
        loss.backward()
        grads = {name: p.grad for name, p in model.named_parameters()}
        unread = [name for name, grad in grads.items() if grad is None]
        last = f"mocet.experts.{model.num_tokens - 1}.pos"
        assert unread == ([last] if kind.startswith("native") else [])
        assert all(grad.isfinite().all() for grad in grads.values() if grad is not None)


@KIND
def test_what_forward_returns_is_what_encode_and_decode_give(kind):
    model, images = small(kind), some_images()
    recon, ids, losses = model(images)
    assert recon.shape == images.shape and recon.dtype == torch.float32
    assert all(loss.ndim == 0 for loss in losses.values())
    assert set(losses) == {"codebook", "commitment"}, "the entropy term costs time: training only"
    assert torch.equal(model.encode(images), ids)
    assert ids.dtype == torch.int64 and ids.shape == (8, model.num_tokens)
    torch.testing.assert_close(model.decode(ids), recon, rtol=1e-4, atol=1e-4)
    assert recon.requires_grad and not model.decode(ids).requires_grad
    for b in range(8):  # images of a batch do not meet
        assert torch.equal(model.encode(images[b:b + 1])[0], ids[b])
        torch.testing.assert_close(model.decode(ids[b:b + 1])[0], recon[b], rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------------------------------------
# modes

@KIND
def test_encode_and_decode_ignore_the_mode_and_leave_it_and_all_else_as_it_was(kind):
    model, images = small(kind, tail_drop=1.0), some_images()
    ids, pictures = model.encode(images), model.decode(model.encode(images))
    model.train().quantizer.bypass = True
    state = {name: t.clone() for name, t in model.state_dict().items()}
    random = torch.get_rng_state()
    assert torch.equal(model.encode(images), ids) and torch.equal(model.decode(ids), pictures)
    assert all(module.training for module in model.modules()) and model.quantizer.bypass
    assert same_content(dict(model.state_dict()), state), "nothing was counted"
    assert torch.equal(torch.get_rng_state(), random)
    model.eval().quantizer.bypass = False
    model.encode(images)
    assert not any(module.training for module in model.modules()) and not model.quantizer.bypass


def kept(model, times):
    """How many codes the decoder got, in each of so many forward passes."""
    lengths = []
    hook = model.decoder.register_forward_pre_hook(
        lambda module, args: lengths.append(args[0].shape[1]))
    with torch.no_grad():
        for _ in range(times):
            model(some_images(1))
    hook.remove()
    return lengths


def test_tail_drop_keeps_all_lengths_alike_in_its_share_of_the_training_steps():
    model = small("titok", tail_drop=0.6, token_schedule=(3,))
    lengths = kept(model.train(), 300)
    for k, expected in ((1, 60), (2, 60), (3, 60 + 120)):  # 0.6 / 3 each, and 0.4 are not cut
        assert abs(lengths.count(k) - expected) < 30
    assert set(kept(model.eval(), 10)) == {3}
    assert set(kept(small("titok", token_schedule=(3,)).train(), 10)) == {3}, "off by default"


# ------------------------------------------------------------------------------------------------
# growth

NEW = ("mocet.experts.2.", "mocet.experts.3.", "decoder.")


@FORMS
def test_through_a_grow_phase_old_ids_and_frozen_parameters_stay_identical_to_the_bit(kind):
    model, images, seen = small(kind), some_images(), []
    ids, pictures = model.encode(images), model.decode(model.encode(images))
    frozen = {name: t.clone() for name, t in model.state_dict().items()
              if not name.startswith("decoder.") and name != "quantizer.count"}
    model.grow(4)
    assert torch.equal(model.encode(images)[:, :2], ids)
    assert torch.equal(model.decode(ids), pictures)
    for name, p in model.named_parameters():
        p.requires_grad_(name.startswith(NEW))
    new = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(new, lr=0.05, weight_decay=0.1)
    model.mit.register_forward_hook(lambda module, args, out: seen.append(out.requires_grad))
    for _ in range(3):
        recon, _, losses = model.train()(images)
        optimizer.zero_grad()
        ((recon - images).square().mean() + losses["codebook"] + losses["commitment"]).backward()
        optimizer.step()
    assert seen == [False] * 3, "what is frozen builds no graph"
    last = model.mocet.experts[-1].pos  # nobody reads the last token
    assert all((p.grad is not None) == (p.requires_grad and p is not last)
               for p in model.parameters())
    model.eval()
    assert model.encode(images).shape == (8, 4)
    assert torch.equal(model.encode(images)[:, :2], ids)
    assert not torch.equal(model.decode(ids), pictures), "while the decoder learned"
    assert all(torch.equal(model.state_dict()[name], t) for name, t in frozen.items())


def test_growth_to_the_same_or_a_smaller_length_or_of_a_baseline_is_refused():
    model = small().grow_to(6)  # in the steps of the schedule, as training took them
    for length in (6, 3, -1):
        refused(model.grow, length, names=[f"cannot grow from 6 to {length} tokens"])
    assert model.mocet.lengths == [2, 4, 6] and [*map(len, model.decoder.code_pos)] == [2, 2, 2]
    refused(small("titok-causal").grow, 8, names=["titok-causal cannot grow"])


# ------------------------------------------------------------------------------------------------
# files

def save(model, path, **changes):
    """The part of a tokenizer checkpoint that rebuilds the model, as train.py writes it."""
    saved = {"tokenizer_config": as_dict(model.cfg), "num_tokens": model.num_tokens,
             "ema": model.state_dict(), "step": 7}
    checkpoint.save(path, {**saved, **changes})


@pytest.mark.parametrize("kind, length", [
    ("native-query", 2), ("native-query", 4), ("native-block", 6), ("titok-causal", 6)])
def test_a_checkpoint_alone_gives_the_same_ids_and_pictures_at_its_length(kind, length, tmp_path):
    model = small(kind).grow_to(length)
    save(model, tmp_path / "tokenizer.pt")
    torch.manual_seed(99)
    loaded = NativeTok.load(tmp_path / "tokenizer.pt")
    ids = model.encode(some_images())
    assert loaded.num_tokens == ids.shape[1] == length
    assert loaded.cfg == model.cfg and not loaded.training
    assert torch.equal(loaded.encode(some_images()), ids)
    assert torch.equal(loaded.decode(ids), model.decode(ids))
    assert torch.equal(loaded.grow_to(6).encode(some_images())[:, :length], ids)


def test_another_kind_of_checkpoint_and_weights_of_another_size_are_refused(tmp_path):
    path, model = tmp_path / "tokenizer.pt", small().grow_to(4)
    checkpoint.save(path, {"kind": "ar"})
    refused(NativeTok.load, path, names=["is not a tokenizer checkpoint"])
    save(model, path, num_tokens=6)
    refused(NativeTok.load, path, names=["missing: mocet.experts.4", "more)"])
    save(model, path, num_tokens=2)
    refused(NativeTok.load, path, names=["unexpected: mocet.experts.2"])
    save(model, path, tokenizer_config=as_dict(dataclasses.replace(model.cfg, codebook_size=64)))
    refused(NativeTok.load, path, names=["wrong shape: quantizer.codebook"])


def test_what_python_users_hand_over_is_looked_at():
    """Each kind of mistake: test_given.py."""
    model, images = small().eval(), some_images(2)
    refused(model.encode, 255 * images, names=["images", "(B, 3, 16, 16)", "to_float"])
    ids = model.encode(images)
    refused(model.decode, ids + 1000, names=["0 to"])
    for wrong in (3, ids[:, 0].float(), ids[:1, 0], ids):
        refused(model.encode, images, {0: wrong}, names=["position 0"])
    assert torch.equal(model.decode(ids.int()), model.decode(ids))
