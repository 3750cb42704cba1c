"""The parts that every model here is made of: patches, positions, attention, blocks.

In       sequences (B, T, D) everywhere; images float32 (B, 3, H, W) in [-1, 1]
Out      the same
Try      python layers.py

Three families of blocks, as in the code bases this project stands beside:

    ViTBlock      LayerNorm, GELU, biases                 MIT, decoder, baselines  [ViT, TiTok]
    DiTBlock      the same, but its norms depend on t     flow decoder, D²iT       [DiT]
    LlamaBlock    RMSNorm, SwiGLU, rotary, no biases      generators               [LlamaGen]
"""
import contextlib
import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# ------------------------------------------------------------------------------------------------
# types

def as_weights(x: Tensor, weight: Tensor) -> Tensor:
    """x in the type of a weight: what a model does at its door, so that images may be float32
    whatever the model is. Under autocast x stays as it is, as torch then chooses types.
    """
    device = x.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return x
    return x.to(weight.dtype)


def at_least_float32(x: Tensor) -> Tensor:
    """float16 and bfloat16 become float32; float64 stays."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class ExactBuffers(nn.Module):
    """A module whose own buffers keep their type: .bfloat16() and the like round weights alone.

    TRAP: torch rounds buffers too. A threshold, or the angle of step 999, in 8 bits is another one.
    """

    def _apply(self, fn, recurse=True):
        before = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            moved = getattr(self, name)
            if moved.dtype != buffer.dtype:
                setattr(self, name, buffer.to(moved.device))
        return self


# ------------------------------------------------------------------------------------------------
# patches

def patchify(images: Tensor, patch_size: int) -> Tensor:
    """(B, C, H, W) -> (B, N, P*P*C): patches in reading order, each as (row, column, channel)."""
    B, C, H, W = images.shape
    P = patch_size
    x = images.reshape(B, C, H // P, P, W // P, P)
    x = x.permute(0, 2, 4, 3, 5, 1)                           # (B, H/P, W/P, P, P, C)
    return x.reshape(B, (H // P) * (W // P), P * P * C)


def unpatchify(x: Tensor, patch_size: int, image_size: int) -> Tensor:
    """The inverse of patchify for square images: (B, N, P*P*C) -> (B, C, H, W)."""
    B, P, S = x.shape[0], patch_size, image_size // patch_size
    x = x.reshape(B, S, S, P, P, -1)
    x = x.permute(0, 5, 1, 3, 2, 4)                           # (B, C, S, P, S, P)
    return x.reshape(B, -1, image_size, image_size)


# ------------------------------------------------------------------------------------------------
# positions

def sincos_2d(side: int, width: int) -> Tensor:
    """Sine-cosine positions of a side x side grid: (side*side, width).

    Half of the channels tell the row and half the column.
    Frequencies fall from 1.5 radians per patch to 1.5 / 4 radians over the whole side [ours]. The
    usual base of 10,000 [MAE] is made for long sequences: on a 4x4 grid it leaves most channels
    constant and all positions look alike. Cosines between two of them at width 64 go from 0.77 to
    0.98 there, and from 0.20 to 0.90 here. Every row has the same norm, sqrt(width / 2), which is
    "unit scale" beside a LayerNorm.
    """
    omega = 1.5 * (4.0 * side) ** -torch.linspace(0, 1, width // 4, dtype=torch.float64)
    angle = torch.arange(side, dtype=torch.float64)[:, None] * omega          # (side, width/4)
    axis = torch.cat([angle.sin(), angle.cos()], dim=1)                       # (side, width/2)
    rows, columns = axis.repeat_interleave(side, 0), axis.repeat(side, 1)
    return torch.cat([rows, columns], dim=1).float()


def rotary_table(length: int, head_dim: int) -> Tensor:
    """Rotary angles in one dimension as cosine and sine: (length, head_dim/2, 2) [RoFormer]."""
    omega = 10000.0 ** (-torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    angle = torch.arange(length, dtype=torch.float32)[:, None] * omega
    return torch.stack([angle.cos(), angle.sin()], dim=-1)


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Turn neighbouring channel pairs by the angles in a table.

    x (B, heads, T, head_dim), table (T, head_dim/2, 2) -> (B, heads, T, head_dim), in x's dtype

    To turn a pair (a, b) by an angle is to multiply a + ib by exp(i angle). Complex numbers are at
    least float32, whatever x and the table are.
    """
    # TRAP: view_as_complex wants the two numbers of a pair next to each other in memory.
    pairs = at_least_float32(x).contiguous().unflatten(-1, (-1, 2))  # (B, heads, T, head_dim/2, 2)
    table = torch.view_as_complex(at_least_float32(table).contiguous())  # (T, head_dim/2)
    return torch.view_as_real(torch.view_as_complex(pairs) * table).flatten(-2).type_as(x)


# ------------------------------------------------------------------------------------------------
# which weights are matrices

def as_matrices(module: nn.Module, count: int = 1) -> nn.Module:
    """Mark the module's own weights for the optimizer (loop.new_optimizer), and return it.

    count   matrices from hidden channels to hidden channels that are stored as one: Muon's.
            0: they read or write something else, such as codes or pixels: AdamW's
    What counts as its weights: the one called weight, and stacks (n, out, in). A Linear, a
    convolution and an embedding without a mark are 0; a bare parameter without a mark is a position
    or a bias, which no weight decay touches.
    """
    module.matrices = count
    return module


# ------------------------------------------------------------------------------------------------
# attention

class Attention(nn.Module):
    """Multi-head self-attention, x (B, T, D) -> (B, T, D).

    mask     bool (T, T) or (B, 1, 1, T), True where row may look at column; None: all is visible
    causal   token t sees tokens 0..t
    rotary   the rows of rotary_table for these T positions, or None
    """

    def __init__(self, width: int, heads: int, bias: bool = True):
        super().__init__()
        self.heads = heads
        self.qkv = as_matrices(nn.Linear(width, 3 * width, bias=bias), 3)
        self.out = as_matrices(nn.Linear(width, width, bias=bias))

    def forward(self, x: Tensor, mask: Tensor | None = None, causal: bool = False,
                rotary: Tensor | None = None) -> Tensor:
        B, T, D = x.shape
        # three of (B, heads, T, D/heads)
        qkv = self.qkv(x).view(B, T, 3, self.heads, D // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        if rotary is not None:
            q, k = rotate(q, rotary), rotate(k, rotary)
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
        # TRAP: reshape without the transpose also runs
        return self.out(x.transpose(1, 2).reshape(B, T, D))


# ------------------------------------------------------------------------------------------------
# blocks

class MLP(nn.Sequential):
    def __init__(self, width: int):
        super().__init__(as_matrices(nn.Linear(width, 4 * width)), nn.GELU(),
                         as_matrices(nn.Linear(4 * width, width)))


class ViTBlock(nn.Module):
    """Pre-norm transformer block (B, T, D) -> (B, T, D) [ViT]."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(width), Attention(width, heads)
        self.norm2, self.mlp = nn.LayerNorm(width), MLP(width)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = x + self.attention(self.norm1(x), mask)
        return x + self.mlp(self.norm2(x))


class RMSNorm(nn.Module):
    """x / rms(x) * weight, computed in float32 or better [LLaMA]."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        x_hat = F.rms_norm(at_least_float32(x), x.shape[-1:], eps=1e-5)
        return (x_hat * self.weight).type_as(x)


class SwiGLU(nn.Module):
    """w2(silu(w1 x) * w3 x); at hidden width 8/3 D it costs what the MLP does [LLaMA].

    w1 and w3 are stored as one matrix, w13: one product, and one reading of x, for both.
    """

    def __init__(self, width: int):
        super().__init__()
        hidden = -(-8 * width // 3 // 64) * 64  # rounded up to a multiple of 64; 2048 at 768
        self.w13 = as_matrices(nn.Linear(width, 2 * hidden, bias=False), 2)
        self.w2 = as_matrices(nn.Linear(hidden, width, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.w13(x).chunk(2, dim=-1)
        return self.w2(F.silu(gate) * up)


class LlamaBlock(nn.Module):
    """Pre-norm block with RMSNorm, rotary attention, SwiGLU: (B, T, D) -> (B, T, D) [LlamaGen]."""

    def __init__(self, width: int, heads: int, dropout: float = 0.0):
        super().__init__()
        self.norm1, self.attention = RMSNorm(width), Attention(width, heads, bias=False)
        self.norm2, self.mlp = RMSNorm(width), SwiGLU(width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, rotary: Tensor, causal: bool) -> Tensor:
        x = x + self.dropout(self.attention(self.norm1(x), causal=causal, rotary=rotary))
        return x + self.dropout(self.mlp(self.norm2(x)))

    def newest(self, x: Tensor, angles: Tensor, cache: "KVCache", t: int) -> Tensor:
        """The same, fast, for row t alone: x (B, D), when the rows before it are in the cache.

        angles   (1, D/heads/2, 2): row t of rotary_table
        """
        attention = self.attention
        qkv = attention.qkv(self.norm1(x)).view(len(x), 3, attention.heads, -1)
        q, k = rotate(qkv[:, :2], angles).unbind(1)  # (B, heads, D/heads) each
        x = x + attention.out(cache.attend(q, k, qkv[:, 2], t))
        return x + self.mlp(self.norm2(x))


# ------------------------------------------------------------------------------------------------
# blocks that are told a time, for diffusion

class TimeEmbedding(ExactBuffers):
    """t (B,) -> (B, D): waves of 128 lengths, then an MLP [DiT]."""

    def __init__(self, width: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, width), nn.SiLU(),
                                 as_matrices(nn.Linear(width, width)))
        omega = torch.exp(-math.log(10000) * torch.arange(128) / 128)
        self.register_buffer("omega", omega, persistent=False)

    def forward(self, t: Tensor) -> Tensor:
        angle = t.float()[:, None] * self.omega               # (B, 128)
        waves = torch.cat([angle.cos(), angle.sin()], dim=1)  # (B, 256)
        return self.mlp(as_weights(waves, self.mlp[0].weight))


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x (B, T, D) moved and stretched as the condition says; shift, scale (B, D)."""
    return x * (1 + scale[:, None]) + shift[:, None]


def adaptive(width: int, count: int) -> nn.Sequential:
    """c (B, D) -> `count` vectors (B, D) in one, all zero at first [DiT's adaLN-zero]."""
    return nn.Sequential(nn.SiLU(), as_matrices(nn.Linear(width, count * width), count))


class DiTBlock(nn.Module):
    """x (B, T, D), c (B, D) -> (B, T, D). Gates start at zero, so at first it changes nothing."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.norm2 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.attention, self.mlp = Attention(width, heads), MLP(width)
        self.condition = adaptive(width, 6)

    def forward(self, x: Tensor, c: Tensor, mask: Tensor | None = None) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.condition(c).chunk(6, dim=1)
        x = x + gate1[:, None] * self.attention(modulate(self.norm1(x), shift1, scale1), mask)
        return x + gate2[:, None] * self.mlp(modulate(self.norm2(x), shift2, scale2))


class LastNorm(nn.Module):
    """What DiT does before its head."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.condition = adaptive(width, 2)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        return modulate(self.norm(x), *self.condition(c).chunk(2, dim=1))


# ------------------------------------------------------------------------------------------------
# the same, fast: one row after the other

class KVCache:
    """Keys and values of the rows so far, in buffers of full length that are filled in place.

    One per layer. Only for sampling: writing in place and autograd do not go together.
    """

    def __init__(self, batch: int, heads: int, length: int, head_dim: int, like: Tensor):
        """like   of the wanted type, on the wanted device"""
        self.k = like.new_zeros(batch, heads, length, head_dim)
        self.v = torch.zeros_like(self.k)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, t: int) -> Tensor:
        """Keep k and v of row t, and mix what q sees, rows 0 to t.

        each (B, heads, D/heads) -> (B, D)
        """
        self.k[:, :, t], self.v[:, :, t] = k, v
        seen = self.k[:, :, :t + 1], self.v[:, :, :t + 1]
        return F.scaled_dot_product_attention(q[:, :, None], *seen).flatten(1)


# ------------------------------------------------------------------------------------------------
# modes

@contextlib.contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """with eval_mode(model): no gradients, no dropout, and whatever else is for training only.

    Afterwards the model is in the mode it was in, also if there was an error.
    """
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


# ------------------------------------------------------------------------------------------------
# initialisation

def init_vit(module: nn.Module) -> None:
    """Initialise one Linear of a ViT; use as model.apply(init_vit).

    Matrices are Xavier-uniform and biases zero [MAE], so that a block keeps the scale of what it
    reads.
    """
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    if isinstance(module, Attention):
        # three square matrices that happen to be stored as one
        q, k, v = module.qkv.weight.data.chunk(3)
        for part in (q, k, v):
            nn.init.xavier_uniform_(part)


def count_parameters(module: nn.Module, learning_only: bool = False) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad or not learning_only)


if __name__ == "__main__":
    positions = sincos_2d(4, 64)
    print("How alike are the positions of a 4x4 grid?")
    print("Patch 5 (row 1, column 1) against all, as cosines:")
    print(F.cosine_similarity(positions[5], positions).view(4, 4).numpy().round(2))
    print("\nIts neighbours are nearest: attention can find them before anything has been learned.")
