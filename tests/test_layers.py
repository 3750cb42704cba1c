"""Promises of layers.py: patches lie where they should, and attention is what its formula says."""
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import layers
from layers import (
    Attention, KVCache, LlamaBlock, RMSNorm, SwiGLU, ViTBlock, eval_mode, patchify, rotary_table,
    rotate, sincos_2d, unpatchify)

HEADS, D, T, B = 2, 8, 6, 3


def some(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def attention(bias=True) -> Attention:
    """With weights so large that every visible token makes a difference, and biases that do."""
    torch.manual_seed(0)
    module = Attention(D, HEADS, bias)
    for p in module.parameters():
        nn.init.normal_(p, std=0.7)
    return module


# ------------------------------------------------------------------------------------------------
# patches

def test_unpatchify_undoes_patchify():
    images = some(2, 3, 12, 12)
    for P in (1, 2, 3, 4, 6, 12):
        assert torch.equal(unpatchify(patchify(images, P), P, 12), images)


def test_patches_are_in_reading_order_and_hold_row_column_channel():
    H, W, P = 4, 6, 2
    c, y, x = torch.meshgrid(torch.arange(3), torch.arange(H), torch.arange(W), indexing="ij")
    # every pixel tells its channel, row and column
    patches = patchify((100 * c + 10 * y + x)[None].float(), P)[0]
    assert patches.shape == (6, 12)
    for n in range(6):
        top, left = n // 3 * P, n % 3 * P
        pixels = itertools.product(range(P), range(P), range(3))
        expected = [100 * c + 10 * (top + y) + left + x for y, x, c in pixels]
        assert patches[n].tolist() == expected


# ------------------------------------------------------------------------------------------------
# positions

def test_the_nearest_sincos_rows_are_the_neighbouring_patches():
    rows = F.normalize(sincos_2d(4, 64), dim=1)
    place = torch.cartesian_prod(torch.arange(4.0), torch.arange(4.0))  # (16, 2)
    distance, alike = torch.cdist(place, place), rows @ rows.T
    for n in range(16):
        assert alike[n][distance[n] == 1].min() > alike[n][distance[n] > 1].max()


def turned_by_hand(x, table):
    """rotate() in real numbers."""
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = table.unbind(-1)
    return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2)


def test_a_complex_product_is_a_rotation():
    x, results, grads = torch.randn(2, 3, 5, 8), [], []
    for turn in (rotate, turned_by_hand):
        own = x.clone().requires_grad_()
        results.append(turn(own, rotary_table(5, 8)))
        results[-1].square().mul(torch.arange(8.0)).sum().backward()
        grads.append(own.grad)
    torch.testing.assert_close(*results)
    torch.testing.assert_close(*grads)
    assert torch.equal(results[0][:, :, 0], x[:, :, 0]) and not torch.equal(results[0], x)


def test_rotated_dot_products_depend_on_the_distance_alone():
    q, k = some(2, 1, 1, 1, D)
    table = rotary_table(12, D)
    turned_q, turned_k = (rotate(x.expand(1, 1, 12, D), table)[0, 0] for x in (q, k))
    dots = turned_q @ turned_k.T                                              # (12, 12)
    for distance in range(-11, 12):
        diagonal = dots.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=1e-4, atol=1e-4)
    first = dots[0].sort().values
    assert (first.diff() > 1e-4).all(), "and it does depend on it"


# ------------------------------------------------------------------------------------------------
# attention

def naive(module: Attention, x, visible, table=None):
    """Attention as its formula, one head and one row at a time; visible (T, T) bool."""
    D, size = x.shape[-1], x.shape[-1] // module.heads
    bias = module.qkv.bias if module.qkv.bias is not None else torch.zeros(3 * D)
    weights = module.qkv.weight.chunk(3)
    q, k, v = (x @ w.T + b for w, b in zip(weights, bias.chunk(3)))
    mixed = torch.zeros_like(x)
    for b in range(len(x)):
        for head in range(module.heads):
            channels = slice(head * size, (head + 1) * size)
            qs, ks = q[b, :, channels], k[b, :, channels]
            if table is not None:
                qs, ks = (rotate(part[None, None], table)[0, 0] for part in (qs, ks))
            for t in range(x.shape[1]):
                weights = torch.exp(ks @ qs[t] / math.sqrt(size)) * visible[t]
                mixed[b, t, channels] = weights / weights.sum() @ v[b, :, channels]
    return module.out(mixed)


EVERYTHING, PAST = torch.ones(T, T, dtype=torch.bool), torch.ones(T, T, dtype=torch.bool).tril()
ODD = (some(T, T) > 0) | torch.eye(T, dtype=torch.bool)  # its rows are not its columns


@pytest.mark.parametrize("settings, visible", [
    (dict(), EVERYTHING), (dict(mask=ODD), ODD),
    (dict(rotary=rotary_table(T, D // HEADS), causal=True), PAST)])
@pytest.mark.parametrize("bias", [True, False])
def test_attention_equals_its_formula(settings, visible, bias):
    module, x = attention(bias), some(B, T, D)
    with torch.no_grad():
        expected = naive(module, x, visible, settings.get("rotary"))
        torch.testing.assert_close(module(x, **settings), expected, rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------------------------------------
# blocks

def test_rms_norm_equals_its_formula_and_computes_in_float32():
    module, x = RMSNorm(D), 1000 * some(B, T, D)
    nn.init.normal_(module.weight)
    expected = x / x.square().mean(dim=-1, keepdim=True).sqrt() * module.weight
    torch.testing.assert_close(module(x), expected)
    half = x.bfloat16()
    assert torch.equal(module(half), module(half.float()).bfloat16())


def test_swiglu_equals_its_formula_at_the_cost_of_an_mlp():
    module, x = SwiGLU(D), some(B, T, D)
    w1, w3 = module.w13.weight.chunk(2)
    gate = x @ w1.T
    expected = (gate * gate.sigmoid() * (x @ w3.T)) @ module.w2.weight.T
    torch.testing.assert_close(module(x), expected)
    mlp = 8 * 768 ** 2
    assert abs(layers.count_parameters(SwiGLU(768)) / mlp - 1) < 0.01


def run(block, x):
    if isinstance(block, ViTBlock):
        return block(x)
    return block(x, rotary_table(x.shape[1], D // HEADS), causal=True)


@pytest.mark.parametrize("Block", [ViTBlock, LlamaBlock])
def test_a_block_adds_to_what_it_reads_and_norms_before_it_looks(Block):
    block, x = Block(D, HEADS).double(), some(B, T, D).double()
    added = [run(block, scale * x) - scale * x for scale in (1e4, 2e4)]
    # only the direction of x is looked at
    torch.testing.assert_close(added[0], added[1], rtol=0, atol=1e-3)
    assert added[0].abs().max() > 0.1
    for name, p in block.named_parameters():
        if "out" in name or "mlp.2" in name or "w2" in name:  # the last matrix of each branch
            nn.init.zeros_(p)
    assert torch.equal(run(block, x), x)


# ------------------------------------------------------------------------------------------------
# one row after the other

@pytest.mark.parametrize("dtype, exact", [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
@pytest.mark.parametrize("batch", [2, 5])
def test_rows_one_by_one_equal_the_whole_sequence_at_once(batch, dtype, exact):
    """In a cache that held other numbers before, as those of another batch."""
    torch.manual_seed(0)
    block, x = LlamaBlock(D, HEADS).to(dtype).eval(), some(batch, T, D).to(dtype)
    table, cache = rotary_table(T, D // HEADS), KVCache(batch, HEADS, T, D // HEADS, like=x)
    nn.init.normal_(cache.k), nn.init.normal_(cache.v)
    rows = []
    with torch.no_grad():
        for t in range(T):
            rows.append(block.newest(x[:, t], table[t:t + 1], cache, t))
        expected = block(x, table, causal=True)
    torch.testing.assert_close(torch.stack(rows, dim=1), expected, rtol=exact, atol=exact)


# ------------------------------------------------------------------------------------------------
# modes

def test_eval_mode_has_no_dropout_and_no_gradient_and_restores_the_mode_even_after_an_error():
    block, x = LlamaBlock(D, HEADS, dropout=0.5), some(B, T, D)
    assert not torch.equal(run(block, x), run(block, x))
    for training in (True, False):
        block.train(training)
        with eval_mode(block):
            assert torch.equal(run(block, x), run(block, x)) and not run(block, x).requires_grad
        with pytest.raises(ZeroDivisionError), eval_mode(block):
            raise ZeroDivisionError
        assert all(module.training == training for module in block.modules())
        assert run(block, x).requires_grad


# ------------------------------------------------------------------------------------------------
# initialisation

def test_queries_keys_and_values_start_as_three_square_matrices():
    torch.manual_seed(0)
    block = ViTBlock(64, 4).apply(layers.init_vit)
    q, k, v = block.attention.qkv.weight.detach().chunk(3)
    bound = math.sqrt(6 / (64 + 64))  # Xavier-uniform of a square matrix
    for part in (q, k, v):
        assert 0.99 < part.abs().max() / bound <= 1
        assert part.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)
    hidden = block.mlp[0].weight.detach()
    assert 0.99 < hidden.abs().max() / math.sqrt(6 / (64 + 256)) <= 1
    assert not any(p.any() for name, p in block.named_parameters() if name.endswith("bias"))
