"""Promises of quantizer.py: the nearest code, gradients for whom they are, no code stays dead."""

import torch
import torch.nn.functional as F

from config import TokenizerConfig
from helpers import ranks
from quantizer import VectorQuantizer, usage

K, d = 16, 4


def small(codebook_size=K, code_dim=d) -> VectorQuantizer:
    """Codes of very different lengths: only their directions may matter."""
    torch.manual_seed(0)
    quantizer = VectorQuantizer(TokenizerConfig(codebook_size=codebook_size, code_dim=code_dim))
    quantizer.codebook.data *= torch.linspace(0.2, 5, codebook_size)[:, None]
    return quantizer


def some_z(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rows_in(rows, others):
    """For each row, is it one of the others?"""
    return torch.cdist(rows, others).min(dim=1).values < 1e-3


# ------------------------------------------------------------------------------------------------
# nearest code

def test_each_vector_gets_the_nearest_code_on_the_sphere_whatever_its_length():
    quantizer, z = small(), some_z(5, 7, d)
    z_q, ids, _ = quantizer(z)
    codes = [code / code.norm() for code in quantizer.codebook.detach()]
    for b in range(5):
        for i in range(7):
            distances = [(z[b, i] / z[b, i].norm() - code).norm().item() for code in codes]
            assert ids[b, i] == min(range(K), key=distances.__getitem__)
    assert ids.shape == (5, 7) and ids.dtype == torch.int64 and ids.unique().numel() > 8
    torch.testing.assert_close(z_q, quantizer.lookup(ids))
    torch.testing.assert_close(z_q.norm(dim=-1), torch.ones(5, 7))


def test_under_bf16_autocast_codes_are_compared_in_float32():
    quantizer, z = small(codebook_size=1000), some_z(500, d)
    expected = quantizer(z)
    in_bf16 = (F.normalize(z, dim=1).bfloat16() @ quantizer.codes().bfloat16().T).argmax(dim=1)
    assert not torch.equal(in_bf16, expected[1]), "it matters here"
    with torch.autocast("cpu", torch.bfloat16):
        z_q, ids, losses = quantizer(z)
        half = quantizer(z.bfloat16())  # what a linear layer hands over under autocast
        assert quantizer.lookup(ids).dtype == torch.float32
    assert torch.equal(ids, expected[1]) and torch.equal(z_q, expected[0]) and losses == expected[2]
    assert half[0].dtype == torch.float32
    assert torch.equal(half[1], quantizer(z.bfloat16().float())[1])


# ------------------------------------------------------------------------------------------------
# losses and gradients

def gradients(quantizer, scalar, z):
    quantizer.codebook.grad = z.grad = None
    scalar.backward(retain_graph=True)
    return quantizer.codebook.grad, z.grad


def is_zero(grad) -> bool:
    return grad is None or not grad.any()


def test_the_gradient_at_z_q_passes_to_normalised_z_unchanged():
    quantizer, z, weights = small(), some_z(6, d).requires_grad_(), some_z(6, d, seed=2)
    codebook, straight = gradients(quantizer, (quantizer(z)[0] * weights).sum(), z)
    _, identity = gradients(quantizer, (F.normalize(z, dim=-1) * weights).sum(), z)
    torch.testing.assert_close(straight, identity)
    assert straight.abs().max() > 0.1 and is_zero(codebook), "and the decoder does not move codes"


def test_the_codebook_loss_moves_chosen_codes_alone_and_the_commitment_loss_vectors_alone():
    """Both are the mean squared distance to the code."""
    quantizer, z = small(), some_z(6, d).requires_grad_()
    _, ids, losses = quantizer(z)
    distance = F.normalize(z, dim=-1) - F.normalize(quantizer.codebook[ids], dim=-1)
    for name in ("codebook", "commitment"):
        torch.testing.assert_close(losses[name], distance.square().mean())
    codebook, vectors = gradients(quantizer, losses["codebook"], z)
    chosen = torch.isin(torch.arange(K), ids)
    assert not chosen.all() and is_zero(vectors)
    assert torch.equal(codebook.abs().sum(dim=1) > 0, chosen)
    codebook, vectors = gradients(quantizer, losses["commitment"], z)
    assert is_zero(codebook) and (vectors.abs().sum(dim=1) > 0).all()


def test_continuous_codes_pass_z_through_while_the_codebook_runs_after_it():
    quantizer, z, weights = small(), some_z(6, d).requires_grad_(), some_z(6, d, seed=2)
    expected = quantizer(z)[1]
    quantizer.bypass = True
    z_q, ids, losses = quantizer(z)
    assert torch.equal(z_q, F.normalize(z, dim=-1)) and torch.equal(ids, expected)
    _, passed = gradients(quantizer, (z_q * weights).sum(), z)
    _, identity = gradients(quantizer, (F.normalize(z, dim=-1) * weights).sum(), z)
    assert torch.equal(passed, identity)
    codebook, vectors = gradients(quantizer, losses["codebook"], z)
    assert codebook.any() and is_zero(vectors)
    assert losses["commitment"] == 0, "nothing holds z near codes that are not used yet"
    quantizer.eval()
    z_q, ids, _ = quantizer(z)
    torch.testing.assert_close(z_q, quantizer.codes()[expected]), "they are in eval mode"
    assert torch.equal(ids, expected)


def test_entropy_loss_anchors_one_code_is_1_and_all_codes_alike_is_0_at_each_position():
    quantizer = VectorQuantizer(TokenizerConfig(codebook_size=4, code_dim=4))
    quantizer.codebook.data = torch.eye(4)
    codes = torch.eye(4)[:, None]  # (B=4, L=1, d): the batch says each code once
    assert quantizer(codes)[2]["entropy"] < 1e-3
    assert quantizer(codes[:1].expand(4, 1, 4))[2]["entropy"] > 0.99
    half = quantizer(codes[[0, 0, 1, 1]])[2]["entropy"]
    torch.testing.assert_close(half, torch.tensor(0.5), atol=2e-3, rtol=0)    # log 2 of log 4
    silent = torch.eye(4).expand(8, 4, 4)  # position i says code i, whatever the image
    assert quantizer(silent)[2]["entropy"] > 0.99


def test_the_entropy_loss_moves_vectors_alone_and_apart():
    quantizer, z = small(), (torch.ones(8, 1, d) + 0.1 * some_z(8, 1, d)).requires_grad_()
    loss = quantizer(z)[2]["entropy"]
    codebook, vectors = gradients(quantizer, loss, z)
    assert is_zero(codebook) and vectors.any()
    moved = quantizer((z - 10 * vectors).detach())
    assert moved[2]["entropy"] < loss - 0.01


# ------------------------------------------------------------------------------------------------
# usage

def test_usage_anchors_uniform_is_K_and_constant_is_1():
    uniform, constant = torch.arange(K), torch.zeros(K, dtype=torch.int64)
    ids = torch.stack([uniform, constant, uniform % 4], dim=1)  # (K, 3)
    used, perplexity = usage(ids, K)
    assert used == 1.0
    torch.testing.assert_close(perplexity, torch.tensor([K, 1, 4], dtype=torch.float64))
    assert usage(ids[:, 1:], K)[0] == 4 / K


# ------------------------------------------------------------------------------------------------
# codes that nothing chooses

def test_a_restart_moves_exactly_the_unused_codes_and_onto_recent_vectors():
    quantizer = small()
    quantizer(quantizer.codebook.detach()[[2, 3, 5]])
    # the last step, with enough vectors for all
    quantizer(some_z(100, d).abs() + quantizer.codebook.detach()[2])
    used, before = quantizer.count > 0, quantizer.codebook.detach().clone()
    assert used[[2, 3, 5]].all() and not used.all()
    moved = quantizer.restart_dead_codes()
    after = quantizer.codebook.detach()
    assert torch.equal(moved, ~used)
    assert torch.equal(after[used], before[used]), "bit for bit"
    assert rows_in(after[moved], quantizer.recent).all()
    assert not rows_in(before[moved], quantizer.recent).any()
    assert torch.pdist(after).min() > 0, "no two of them equal"
    assert not quantizer.count.any(), "counting starts anew"
    quantizer(after[moved])
    assert torch.equal(quantizer.restart_dead_codes(), ~moved), "where they are now they are chosen"


def test_a_drawn_codebook_consists_of_different_vectors():
    quantizer, z = small(), some_z(K, d)  # no more than are needed: none is taken twice
    quantizer(z)
    quantizer.draw_codebook(5 * z)
    codes = quantizer.codebook.detach()
    assert rows_in(codes, F.normalize(z, dim=-1)).all() and torch.pdist(codes).min() > 1e-3
    assert not quantizer.count.any()


def test_fewer_vectors_than_codes_still_give_different_codes_near_them():
    quantizer, z = small(), F.normalize(some_z(3, d), dim=-1)
    quantizer.draw_codebook(z)
    codes = quantizer.codes().detach()
    assert torch.pdist(codes).min() > 1e-4
    distance, nearest = torch.cdist(codes, z).min(dim=1)
    assert distance.max() < 0.1
    assert sorted(torch.bincount(nearest).tolist()) == [5, 5, 6], "each vector its share"


TWO_RANKS = """
import sys, torch, torch.distributed as dist
from config import TokenizerConfig
from quantizer import VectorQuantizer
dist.init_process_group("gloo")
rank = dist.get_rank()
quantizer = VectorQuantizer(TokenizerConfig(codebook_size=16, code_dim=4))
torch.manual_seed(0)
quantizer.codebook.data = torch.nn.functional.normalize(torch.randn(16, 4), dim=-1)
before = quantizer.codebook.detach().clone()
torch.manual_seed(100 + rank)  # other random numbers on each rank
quantizer(before[[0, 1]] if rank == 0 else before[[1, 2]])  # 0 is used on one rank, 2 on the other
near_codes = before[[2 * rank] * 4]
quantizer(near_codes + 0.01 * torch.randn(4, 4))
moved = quantizer.restart_dead_codes()
torch.save({"before": before, "moved": moved, "after": quantizer.codebook.detach(),
            "recent": quantizer.recent}, f"{sys.argv[1]}-{rank}")
dist.destroy_process_group()
"""


def test_two_processes_restart_the_same_codes_onto_the_same_vectors_of_both(tmp_path):
    done = ranks(2, "-c", TWO_RANKS, tmp_path / "of")
    assert [rank.returncode for rank in done] == [0, 0], done
    one, two = (torch.load(tmp_path / f"of-{rank}", weights_only=True) for rank in range(2))
    assert torch.equal(one["after"], two["after"]) and torch.equal(one["moved"], two["moved"])
    assert one["moved"].tolist() == [False] * 3 + [True] * 13, "a code that one process used stays"
    assert torch.equal(one["after"][:3], one["before"][:3])
    for rank in (one, two):
        near = torch.cdist(one["after"][3:], rank["recent"]).min(dim=1).values < 0.1
        assert 3 <= near.sum() <= 10, "vectors of both processes were drawn"
