"""Promises of mocet.py: what a token may depend on, one function in two forms, faithful growth."""
import copy
import itertools

import pytest
import torch

from config import TokenizerConfig
from mocet import MoCET
from quantizer import VectorQuantizer

SHORT, LONG, N, E, K, B = 3, 6, 16, 16, 32, 4
FORMS = pytest.mark.parametrize("form", ["query", "block"])
DEPTHS = pytest.mark.parametrize("depth", [1, 2])
FORCING = pytest.mark.parametrize("teacher_forcing", [False, True])


class Watched(VectorQuantizer):
    """A quantizer that remembers the normalised z of each position.

    Where `replace` has a code for a position, it says that one.
    """

    def __init__(self, cfg):
        super().__init__(cfg)
        self.z, self.replace = [], {}

    def quantize(self, z, *others):
        z_q, ids, z = super().quantize(z, *others)
        if len(self.z) in self.replace:
            ids = torch.full_like(ids, self.replace[len(self.z)])
            z_q = self.codes().detach()[ids]
        self.z.append(z)
        return z_q, ids, z


def small(form, depth=1, grown=False, **options) -> tuple[MoCET, Watched]:
    cfg = TokenizerConfig(image_size=32, patch_size=8, expert=form, expert_width=E,
                          expert_heads=2, expert_depth=depth, token_schedule=(SHORT, LONG),
                          codebook_size=K, code_dim=4, **options)
    torch.manual_seed(0)
    mocet, quantizer = MoCET(cfg).eval(), Watched(cfg).eval()
    if grown:
        mocet.grow(LONG)
        mocet.eval()
    for p in mocet.parameters():  # biases start at zero; here they count
        if not p.any():
            torch.nn.init.normal_(p, std=0.3)
    return mocet, quantizer


def some_latents(batch=B):
    return torch.randn(batch, N, E, generator=torch.Generator().manual_seed(1))


def look(mocet, quantizer, x_latent=None, replace=None, forward=None):
    """-> z_q (B, L, d), ids (B, L), losses, z (B, L, d): a pass with what each expert said."""
    quantizer.z, quantizer.replace = [], replace or {}
    x_latent = some_latents() if x_latent is None else x_latent
    z_q, ids, losses = (forward or mocet)(x_latent, quantizer)
    return z_q, ids, losses, torch.stack(quantizer.z, dim=1)


def changed(one, two):
    """(L,) list of bool: at which positions do two (B, L, ...) differ by a single bit?"""
    different = one != two
    return different.flatten(2).any(dim=2).any(dim=0).tolist()


# ------------------------------------------------------------------------------------------------
# what a token may depend on

@FORMS
@DEPTHS
@torch.no_grad()
def test_no_token_depends_on_later_experts_and_all_later_tokens_depend_on_each(form, depth):
    mocet, quantizer = small(form, depth, grown=True)
    for continuous in (False, True):  # unquantized, so that every influence can be seen
        quantizer.train(continuous).bypass = continuous
        z_q, ids, _, z = look(mocet, quantizer)
        for j, expert in enumerate(mocet.experts):
            kept = copy.deepcopy(expert.state_dict())
            for p in expert.parameters():
                p += torch.randn_like(p)
            other_z_q, other_ids, _, other_z = look(mocet, quantizer)
            expert.load_state_dict(kept)
            assert torch.equal(other_ids[:, :j], ids[:, :j]), "bit for bit"
            assert torch.equal(other_z_q[:, :j], z_q[:, :j]), "bit for bit"
            assert changed(other_z, z)[:j + 1] == [False] * j + [True]
            if continuous:
                assert changed(other_z, z) == [False] * j + [True] * (LONG - j)


@FORMS
@DEPTHS
@torch.no_grad()
def test_a_token_depends_on_every_earlier_code_and_on_no_later_one(form, depth):
    mocet, quantizer = small(form, depth, grown=True)
    _, ids, _, z = look(mocet, quantizer)
    for j in range(LONG):
        # All positions say what they said before, except that position j says something else.
        for b in range(B):
            said = dict(enumerate(ids[b].tolist()))
            one = look(mocet, quantizer, some_latents()[b:b + 1], said)[3]
            two = look(mocet, quantizer, some_latents()[b:b + 1], {**said, j: (said[j] + 1) % K})[3]
            assert changed(one, two) == [False] * (j + 1) + [True] * (LONG - j - 1)


@FORMS
@DEPTHS
@torch.no_grad()
def test_experts_meet_only_through_the_codes(form, depth):
    """x_latent is read-only: what an expert did to it, the next one never sees."""
    mocet, quantizer = small(form, depth)
    fixed, x_latent = {i: i for i in range(SHORT)}, some_latents()
    z = look(mocet, quantizer, x_latent, fixed)[3]
    assert torch.equal(x_latent, some_latents())
    for name, p in mocet.experts[0].named_parameters():
        if name != "pos":  # the place of a token belongs to what others read of it
            p += torch.randn_like(p)
    assert changed(look(mocet, quantizer, replace=fixed)[3], z) == [True] + [False] * (SHORT - 1)


@FORMS
@DEPTHS
@torch.no_grad()
def test_the_place_of_a_token_reaches_exactly_the_later_ones(form, depth):
    mocet, quantizer = small(form, depth)
    z = look(mocet, quantizer)[3]
    for j, expert in enumerate(mocet.experts):
        expert.pos.mul_(-1)
        other = look(mocet, quantizer)[3]
        assert changed(other, z) == [False] * (j + 1) + [True] * (SHORT - j - 1)
        expert.pos.mul_(-1)


@FORMS
@DEPTHS
@torch.no_grad()
def test_every_patch_reaches_every_token_directly(form, depth):
    """The codes are held fixed, so that no token can learn of a patch from the tokens before it."""
    mocet, quantizer = small(form, depth, grown=True)
    fixed = {i: i for i in range(LONG)}
    z = look(mocet, quantizer, replace=fixed)[3]
    for n in range(N):
        other = some_latents()
        other[:, n] = other[:, n].flip(1)
        assert changed(look(mocet, quantizer, other, fixed)[3], z) == [True] * LONG


# ------------------------------------------------------------------------------------------------
# the same function, written twice

@DEPTHS
@torch.no_grad()
def test_forward_equals_the_readable_loop(depth):
    """The block form has no fast one. test_force.py: the same under interventions."""
    mocet, quantizer = small("query", depth, grown=True)
    fast, slow = look(mocet, quantizer), look(mocet, quantizer, forward=mocet.forward_loop)
    assert fast[1].shape == (B, LONG) and fast[1].unique().numel() > 4
    assert torch.equal(fast[1], slow[1])
    torch.testing.assert_close(fast[3], slow[3], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(fast[0], slow[0])
    torch.testing.assert_close(fast[2], slow[2])


@DEPTHS
@FORCING
def test_gradients_equal_those_of_the_readable_loop(depth, teacher_forcing):
    mocet, quantizer = small("query", depth, grown=True, teacher_forcing=teacher_forcing)
    weights = torch.randn(B, LONG, 4, generator=torch.Generator().manual_seed(2))

    def gradients(forward):
        x_latent = some_latents().requires_grad_()
        mocet.zero_grad(), quantizer.zero_grad()
        z_q, _, losses, _ = look(mocet, quantizer, x_latent, forward=forward)
        ((z_q * weights).sum() + losses["codebook"] + losses["commitment"]).backward()
        named = {**dict(mocet.named_parameters()), **dict(quantizer.named_parameters()),
                 "x_latent": x_latent}
        unread = named.pop(f"experts.{LONG - 1}.pos")  # of the last token
        assert unread.grad is None
        return {name: p.grad.clone() for name, p in named.items()}

    fast, slow = gradients(mocet), gradients(mocet.forward_loop)
    for name in fast:
        assert fast[name].any(), name
        least = 1e-4 * slow[name].abs().max().item()
        torch.testing.assert_close(fast[name], slow[name], rtol=1e-3, atol=least,
                                   msg=lambda text, name=name: f"{name}: {text}")


@FORMS
@FORCING
def test_under_teacher_forcing_no_gradient_reaches_an_expert_through_its_token(
        form, teacher_forcing):
    mocet, quantizer = small(form, grown=True, teacher_forcing=teacher_forcing)
    z_q = mocet(some_latents(), quantizer)[0]
    z_q[:, 2].square().sum().backward()
    for i, expert in enumerate(mocet.experts):
        learns = any(p.grad is not None and p.grad.any() for p in expert.head.parameters())
        assert learns == (i == 2 or i < 2 and not teacher_forcing)
        # Where a token is read, the reader's loss moves its position all the same.
        assert (expert.pos.grad is not None and expert.pos.grad.any()) == (i < 2)


@DEPTHS
@FORCING
def test_under_autocast_every_parameter_learns(depth, teacher_forcing, monkeypatch):
    """Autocast keeps converted weights; those of a pass without gradients must not be used again.
    Newer versions of torch see to it, older ones need to be told to forget.
    """
    mocet, quantizer = small("query", depth, grown=True, teacher_forcing=teacher_forcing)
    found, told = [], []  # told: how many had emitted then
    monkeypatch.setattr(torch, "clear_autocast_cache", lambda: told.append(len(quantizer.z)))
    for autocast in (False, True):
        mocet.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            quantizer.z, told = [], []
            z_q, _, losses = mocet(some_latents(), quantizer)
            forgot = [*told]
        (z_q.sum() + losses["commitment"]).backward()
        found.append({name: p.grad for name, p in mocet.named_parameters()})
    assert forgot == ([LONG] if teacher_forcing else []), "when all have emitted"
    for name, exact in found[0].items():
        rough = found[1][name]
        assert (rough is None) == (exact is None) == (name == f"experts.{LONG - 1}.pos"), name
        if exact is not None:
            assert (rough - exact).norm() < 0.5 * exact.norm(), name


@FORCING
def test_a_single_expert_learns(teacher_forcing):
    cfg = TokenizerConfig(image_size=32, patch_size=8, expert_width=E, expert_heads=2,
                          token_schedule=(1,), codebook_size=K, code_dim=4,
                          teacher_forcing=teacher_forcing)
    mocet = MoCET(cfg)
    mocet(some_latents(), VectorQuantizer(cfg))[0].square().sum().backward()
    assert mocet.experts[0].query.grad.any()


@DEPTHS
@torch.no_grad()
def test_query_equals_block_at_depth_1_and_not_at_depth_2_where_block_rewrites_every_row(depth):
    query, quantizer = small("query", depth, grown=True)
    block, _ = small("block", depth, grown=True)
    block.load_state_dict(query.state_dict())
    one, two = look(query, quantizer), look(block, quantizer)
    if depth == 1:
        assert torch.equal(one[1], two[1])
        torch.testing.assert_close(one[3], two[3], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(one[0], two[0])
    else:
        assert (one[3] - two[3]).abs().amax(dim=2).min() > 1e-3


# ------------------------------------------------------------------------------------------------
# growth

@FORMS
@DEPTHS
@torch.no_grad()
def test_growth_appends_tokens_and_leaves_the_old_ones_identical_to_the_bit(form, depth):
    mocet, quantizer = small(form, depth)
    before, old = look(mocet, quantizer), dict(mocet.named_parameters())
    mocet.grow(5)
    mocet.grow(LONG)
    mocet.eval()
    after, now = look(mocet, quantizer), dict(mocet.named_parameters())
    assert mocet.num_tokens == LONG and after[1].shape == (B, LONG)
    assert mocet.lengths == [3, 5, 6] and len(mocet.newest()) == 1
    for new, first in ((after[0], before[0]), (after[1], before[1]), (after[3], before[3])):
        assert torch.equal(new[:, :SHORT], first)
    assert all(now[name] is p for name, p in old.items())


@FORMS
@DEPTHS
@FORCING
def test_new_experts_learn_and_the_frozen_ones_build_no_graph(form, depth, teacher_forcing):
    """test_nativetok.py: through such a phase old ids stay identical to the bit."""
    mocet, quantizer = small(form, depth, grown=True, teacher_forcing=teacher_forcing)
    mocet.train().requires_grad_(False), quantizer.train().requires_grad_(False)
    for expert in mocet.newest():
        expert.requires_grad_(True)
    z_q, _, losses, _ = look(mocet, quantizer)
    (z_q.sum() + losses["codebook"] + losses["commitment"]).backward()
    if form == "block" or not teacher_forcing:  # else they have emitted without a graph
        assert [z.requires_grad for z in quantizer.z] == [False] * SHORT + [True] * (LONG - SHORT)
    last = mocet.experts[-1].pos  # nobody reads the last token
    for p in (*mocet.parameters(), *quantizer.parameters()):
        assert (p.grad is not None) == (p.requires_grad and p is not last)
    assert all(p.grad.any() for e in mocet.newest() for p in e.parameters() if p is not last)


# ------------------------------------------------------------------------------------------------
# initialisation

@FORMS
@torch.no_grad()
def test_experts_say_different_things_from_the_start(form):
    """Where attention starts uniform, all of them say the same for hundreds of steps."""
    mocet, quantizer = small(form)
    z = look(mocet, quantizer)[3]
    for one, other in itertools.combinations(z.unbind(1), 2):
        assert (one - other).norm(dim=-1).min() > 0.1
