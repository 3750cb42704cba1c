"""The baselines: latent tokens inside one ViT, unordered (TiTok) or causal among themselves.

Paper    TiTok (arXiv 2406.07550): L learned latents join the N patches, all attend to all, and the
         latents' outputs are quantized. All tokens appear at once: none is produced from another.
In       images (B, 3, H, W) in [-1, 1]
Out      z_q (B, L, d), ids (B, L), losses {"codebook", "commitment", "entropy"}, as from MIT and
         MoCET together
Differs  "titok-causal" [ours]: latent i sees the patches and latents 1..i; patches see patches
         only, or a late latent would reach an early one through them.
         TRAP in TiTok's public code: latents are reshaped (B, L, D) -> (B, D, L) without a
         transpose, which mixes the tokens with their channels; here a token is a token.
Try      python titok.py
"""
import torch
from torch import Tensor, nn

from config import TokenizerConfig
from layers import ViTBlock, as_weights, init_vit, patchify, sincos_2d
from quantizer import VectorQuantizer


class TiTok(nn.Module):
    """images (B, 3, H, W), quantizer -> z_q (B, L, d), ids (B, L), losses {name: scalar}."""

    def __init__(self, cfg: TokenizerConfig):
        super().__init__()
        P, D, L, N = cfg.patch_size, cfg.encoder_width, cfg.num_tokens, cfg.num_patches
        self.patch_size = P
        self.embed = nn.Linear(3 * P * P, D)
        self.pos = nn.Parameter(sincos_2d(cfg.image_size // P, D))            # (N, D)
        # unit scale, so that each asks for something else
        self.latents = nn.Parameter(torch.randn(L, D))
        self.blocks = nn.ModuleList(
            ViTBlock(D, cfg.encoder_heads) for _ in range(cfg.encoder_depth))
        self.norm = nn.LayerNorm(D)
        self.head = nn.Linear(D, cfg.code_dim)
        self.apply(init_vit)
        mask = causal_mask(N, L) if cfg.tokenizer == "titok-causal" else None
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, images: Tensor,
                quantizer: VectorQuantizer) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        images = as_weights(images, self.pos)
        patches = self.embed(patchify(images, self.patch_size)) + self.pos  # (B, N, D)
        latents = self.latents.expand(len(images), -1, -1).to(patches.dtype)  # (B, L, D)
        x = torch.cat([patches, latents], dim=1)  # (B, N + L, D)
        for block in self.blocks:
            x = block(x, self.mask)
        # TRAP: reshape(B, d, L) would run as well, and mix tokens with channels; here a row is a
        # token and stays one.
        return quantizer(self.head(self.norm(x[:, len(self.pos):])))  # (B, L, d)


def causal_mask(N: int, L: int) -> Tensor:
    """(N+L, N+L) bool, True where the row may look at the column.

    Patches look at patches, latent i looks at patches and at latents 1..i.
    """
    mask = torch.ones(N + L, N + L, dtype=torch.bool).tril()
    mask[:, :N] = True
    return mask


if __name__ == "__main__":
    L, N = 4, 3
    mask = causal_mask(N, L)[N:].int()  # (L, N + L), the latents' rows
    codes = torch.ones(L, L, dtype=torch.int).tril(-1)
    print(f"{N} patches and {L} tokens; row i reads the columns with a 1:\n")
    print("titok-causal, latent i          MoCET, expert i")
    print("patches  latents 1..4           patches  codes 1..4")
    for latent, code in zip(mask.tolist(), codes.tolist()):
        print("", *latent[:N], "  ", *latent[N:], "              ", *[1] * N, "  ", *code)
    print("\nLeft, the latents pass through the layers together, and what one reads of another is\n"
          "unfinished, no code has been chosen. Right, code 1 is chosen before expert 2 begins.\n"
          "If code 1 were another one, who could answer to it?\n")

    cfg = TokenizerConfig(tokenizer="titok-causal", image_size=32, patch_size=8, encoder_width=64,
                          encoder_depth=2, encoder_heads=4, token_schedule=(8,), codebook_size=64)
    titok, quantizer = TiTok(cfg), VectorQuantizer(cfg)
    z_q, ids, _ = titok(torch.rand(2, 3, 32, 32) * 2 - 1, quantizer)
    print(f"images (2, 3, 32, 32) -> z_q {tuple(z_q.shape)}, ids {ids[0].tolist()}")
