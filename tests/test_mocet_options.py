"""Promises of mocet.py's options: hidden prior tokens, a shared head, one expert for all."""
import dataclasses
import itertools

import pytest
import test_nativetok
import torch
from test_mocet import (
    DEPTHS, LONG, SHORT, B, K, changed, grow_phase_step, look, parameters_of, small, some_latents)
from test_nativetok import save, some_images

from config import load_preset
from layers import count_parameters
from nativetok import NativeTok
from plumbing import checkpoint

CHOICES = [("prior", "codes", "hidden"), ("head", "own", "shared"), ("experts", "own", "shared")]
NAMES = [name for name, *_ in CHOICES]
OTHERS = [dict(zip(NAMES, values)) for values in itertools.product(*(c[1:] for c in CHOICES))][1:]
EACH = pytest.mark.parametrize("options", OTHERS, ids=lambda o: "-".join(o.values()))
FORMS = pytest.mark.parametrize("form", ["query", "block"])


# ------------------------------------------------------------------------------------------------
# for each combination what is promised of the default

@EACH
@FORMS
@DEPTHS
@torch.no_grad()
def test_forward_equals_the_readable_loop(options, form, depth):
    mocet, quantizer = small(form, depth, grown=True, **options)
    fast, slow = look(mocet, quantizer), look(mocet, quantizer, forward=mocet.forward_loop)
    assert torch.equal(fast[1], slow[1]) and fast[1].unique().numel() > 4
    torch.testing.assert_close(fast[3], slow[3], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(fast[0], slow[0])
    torch.testing.assert_close(fast[2], slow[2])


@EACH
@FORMS
def test_gradients_equal_those_of_the_readable_loop_and_reach_everything(options, form):
    mocet, quantizer = small(form, 2, grown=True, **options)
    weights = torch.randn(B, LONG, 4, generator=torch.Generator().manual_seed(2))
    found = []
    for forward in (mocet, mocet.forward_loop):
        mocet.zero_grad()
        z_q, _, losses, _ = look(mocet, quantizer, forward=forward)
        ((z_q * weights).sum() + losses["commitment"]).backward()
        found.append({name: p.grad.clone() for name, p in mocet.named_parameters()})
    for name, grad in found[0].items():
        assert grad.any(), name
        least = 1e-4 * grad.abs().max().item()
        torch.testing.assert_close(grad, found[1][name], rtol=1e-3, atol=least)


@EACH
@FORMS
@torch.no_grad()
def test_no_token_depends_on_later_queries_and_all_later_tokens_depend_on_each(options, form):
    mocet, quantizer = small(form, 2, grown=True, **options)
    quantizer.train().continuous = True  # unquantized, so that every influence can be seen
    z = look(mocet, quantizer)[3]
    for j in range(LONG):
        query = parameters_of(mocet, j)["query"]
        kept = query.clone()
        query += torch.randn_like(query)
        assert changed(look(mocet, quantizer)[3], z) == [False] * j + [True] * (LONG - j)
        query.copy_(kept)


@EACH
@FORMS
def test_growing_and_training_what_is_new_leave_old_ids_identical_to_the_bit(options, form):
    mocet, quantizer = small(form, 2, **options)
    with torch.no_grad():
        ids, z = look(mocet, quantizer)[1::2]
        mocet.grow(LONG)
        mocet.eval()
        grown = look(mocet, quantizer)
    assert grown[1].shape == (B, LONG)
    assert torch.equal(grown[1][:, :SHORT], ids) and torch.equal(grown[3][:, :SHORT], z)
    mocet.requires_grad_(False), quantizer.requires_grad_(False)
    mocet.groups[-1].requires_grad_(True)
    before = {name: p.clone() for name, p in mocet.named_parameters()}
    grow_phase_step(mocet, quantizer, torch.optim.SGD(mocet.groups[-1].parameters(), lr=1.0))
    assert [z.requires_grad for z in quantizer.z] == [False] * SHORT + [True] * (LONG - SHORT)
    with torch.no_grad():
        after = look(mocet, quantizer)
    assert torch.equal(after[1][:, :SHORT], ids) and torch.equal(after[3][:, :SHORT], z)
    for name, p in mocet.named_parameters():
        assert torch.equal(p, before[name]) != name.startswith("groups.1."), name


@EACH
def test_every_parameter_gets_a_gradient_before_and_after_growth(options):
    """DistributedDataParallel waits for each."""
    model = test_nativetok.small(**options).train()
    for length in (2, 3, 6):  # 3: a group of one expert
        if length > 2:
            model.grow(length)
        model.zero_grad()
        recon, _, losses = model(some_images())
        (recon.square().mean() + losses["codebook"] + losses["commitment"]).backward()
        assert [name for name, p in model.named_parameters() if p.grad is None] == []


@EACH
def test_a_checkpoint_of_any_length_gives_the_same_ids(options, tmp_path):
    for length in (2, 6):
        model = test_nativetok.small(**options).grow_to(length)
        save(model, tmp_path / "tokenizer.pt")
        loaded = NativeTok.load(tmp_path / "tokenizer.pt")
        assert torch.equal(loaded.encode(some_images()), model.encode(some_images()))


# ------------------------------------------------------------------------------------------------
# what each option is

@FORMS
@torch.no_grad()
def test_with_hidden_nobody_reads_what_the_codes_say(form):
    mocet, quantizer = small(form, 2, grown=True, prior="hidden")
    for forward in (mocet, mocet.forward_loop):
        _, ids, _, z = look(mocet, quantizer, forward=forward)
        quantizer.z, other = [], (ids[:, 0] + 1) % K
        _, now, _ = forward(some_latents(), quantizer, force={0: other})
        assert torch.equal(torch.stack(quantizer.z, dim=1), z)
        assert torch.equal(now[:, 0], other) and torch.equal(now[:, 1:], ids[:, 1:])
    names = [name for name, _ in mocet.named_parameters()]
    assert not [name for name in names if "embed_code" in name or "pos" in name]


def test_forcing_an_id_of_a_whole_tokenizer_with_hidden_moves_no_later_one():
    images, moved = some_images(), {}
    for prior in ("codes", "hidden"):
        model = test_nativetok.small(prior=prior).grow_to(6)
        ids = model.encode(images)
        forced = [model.encode(images, {i: (ids[:, i] + 7) % K}) for i in range(5)]
        moved[prior] = sum((now[:, i + 1:] != ids[:, i + 1:]).sum().item()
                           for i, now in enumerate(forced))
    assert moved["hidden"] == 0 < moved["codes"]


@FORMS
@torch.no_grad()
def test_with_hidden_later_experts_read_the_output_before_the_head(form):
    """Another head moves the token itself, and what is read of it stays."""
    for prior, reads in (("codes", True), ("hidden", False)):
        mocet, quantizer = small(form, 2, prior=prior)
        z = look(mocet, quantizer)[3]
        parameters_of(mocet, 0)["head"].neg_()
        later = changed(look(mocet, quantizer)[3], z)
        assert later == [True] + [reads] * (SHORT - 1)


def test_what_is_shared_is_there_once_and_growth_adds_no_more_of_it():
    E, code = 16, 4
    one_expert, one_head = 12 * E * E + 6 * E, code * E + code
    for experts, head in itertools.product(("own", "shared"), repeat=2):
        mocet, _ = small("query", experts=experts, head=head)
        embed = count_parameters(mocet.embed_code)
        for n in (SHORT, LONG):
            if n == LONG:
                mocet.grow(LONG)
            expected = (n if experts == "own" else 1) * one_expert
            expected += (n if head == "own" else 1) * one_head + n * 2 * E
            assert count_parameters(mocet) - embed == expected


@FORMS
@torch.no_grad()
def test_one_expert_for_all_is_what_equal_experts_are(form):
    """Experts whose parameters are all equal, but for query and place, are the shared one."""
    own, quantizer = small(form, 2, grown=True)
    shared, _ = small(form, 2, grown=True, experts="shared", head="shared")
    parameters = dict(shared.named_parameters())
    for i in range(LONG):
        for name, p in parameters_of(own, i).items():
            if name not in ("query", "pos"):
                p.copy_(parameters[f"groups.0.{name}"][0])
    for name in ("groups.0.query", "groups.0.pos", "groups.1.query", "groups.1.pos",
                 "embed_code.weight", "embed_code.bias"):
        parameters[name].copy_(dict(own.named_parameters())[name])
    one, other = look(own, quantizer), look(shared, quantizer)
    assert torch.equal(one[1], other[1])
    torch.testing.assert_close(one[3], other[3])


# ------------------------------------------------------------------------------------------------
# what was trained before there were these options

def test_a_checkpoint_from_before_the_options_loads(tmp_path):
    model, path = test_nativetok.small().grow_to(6), tmp_path / "tokenizer.pt"
    save(model, path)
    saved = checkpoint.load(path)
    for name in NAMES:
        del saved["tokenizer_config"][name]
    checkpoint.save(path, saved)
    assert torch.equal(NativeTok.load(path).encode(some_images()), model.encode(some_images()))


def test_parameters_of_the_default_are_named_as_ever():
    own = {"query", "pos", "head", "head_bias",
           *(f"layers.0.{name}" for name in "wq wk wv wo bo w1 b1 w2 b2".split())}
    expected = {f"groups.{g}.{name}" for g in (0, 1) for name in own}
    mocet, _ = small("query", grown=True)
    assert set(mocet.state_dict()) == expected | {"embed_code.weight", "embed_code.bias"}


# ------------------------------------------------------------------------------------------------
# the preset of the earlier code's sizes

EARLIER = load_preset("imagenet-32-2024")[0]


def test_the_preset_of_2024_has_the_parameters_that_its_sizes_make():
    with torch.device("meta"):  # counted without making them
        model = NativeTok(EARLIER)

    def blocks(width, depth):  # matrices and biases of ViT blocks, and two norms each
        return depth * (12 * width ** 2 + 9 * width + 4 * width)

    N, E, code = 256, 256, 12
    patches_in = 768 * 1024 + 1024 + N * 1024  # embedding, positions
    switcher = 2 * 1024 + 1024 * E + E  # with the norm before it
    assert count_parameters(model.mit) == blocks(1024, 18) + patches_in + switcher
    assert round(count_parameters(model.mit) / 1e6) == 228
    one_expert = 2 * (12 * E ** 2 + 6 * E)  # no biases of q, k, v, no scales of norms
    assert round(one_expert / 1e6, 2) == 1.58
    assert count_parameters(model.mocet) == 32 * (one_expert + E) + E * code + code
    pixels_out = 2 * 1024 + 1024 * 768 + 768
    codes_in = code * 1024 + 1024 + (N + 32) * 1024
    assert count_parameters(model.decoder) == blocks(1024, 24) + codes_in + pixels_out


def test_the_preset_of_2024_takes_a_step_with_small_widths():
    torch.manual_seed(0)
    model = NativeTok(dataclasses.replace(
        EARLIER, image_size=16, patch_size=4, encoder_width=32, encoder_heads=2, encoder_depth=1,
        expert_width=16, expert_heads=2, decoder_width=32, decoder_heads=2, decoder_depth=1,
        codebook_size=K)).train()
    optimizer, seen = torch.optim.AdamW(model.parameters(), lr=1e-3), []
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for _ in range(2):
        recon, ids, losses = model(some_images())
        loss = (recon - some_images()).square().mean() + losses["codebook"] + losses["commitment"]
        seen.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert ids.shape == (8, 32) and seen[1] < seen[0]
    assert not [name for name, p in model.named_parameters() if torch.equal(p, before[name])]
