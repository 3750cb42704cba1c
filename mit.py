"""MIT, the Meta Image Transformer: the whole image at once, as features for the experts.

Paper    "bidirectional modelling of the whole image into latent features"; a "dimension switcher"
         narrows them to the experts' width; computed once per image and then fixed
In       images (B, 3, H, W) in [-1, 1]
Out      x_latent (B, N, E), one row per patch
Differs  The paper's size of MIT is not known to us. The first author's earlier public experiments
         have a ViT of width 1024 and 18 layers with learned positions and a CLS row, and hand over
         the patch features without extra queries. We hand over the patch features too, without
         the CLS row, from a ViT of TiTok-B's size whose positions start as sines [ours].
Try      python mit.py
"""
import torch
from torch import Tensor, nn

from config import TokenizerConfig
from layers import (
    ViTBlock, as_matrices, as_weights, count_parameters, init_vit, patchify, sincos_2d)


class MIT(nn.Module):
    """images (B, 3, H, W) -> x_latent (B, N, E)."""

    def __init__(self, cfg: TokenizerConfig):
        super().__init__()
        P, D = cfg.patch_size, cfg.encoder_width
        self.patch_size = P
        self.embed = nn.Linear(3 * P * P, D)
        # (N, D) starts as sine and cosine, then learns
        self.pos = nn.Parameter(sincos_2d(cfg.image_size // P, D))
        self.blocks = nn.ModuleList(
            ViTBlock(D, cfg.encoder_heads) for _ in range(cfg.encoder_depth))
        self.norm = nn.LayerNorm(D)
        self.dimension_switcher = as_matrices(nn.Linear(D, cfg.expert_width))
        # Positions at unit scale: attention can tell patches apart from the first step. With small
        # ones it starts uniform, and every token reads the mean patch, for hundreds of steps.
        self.apply(init_vit)

    def forward(self, images: Tensor) -> Tensor:
        images = as_weights(images, self.pos)
        x = self.embed(patchify(images, self.patch_size)) + self.pos  # (B, N, D)
        for block in self.blocks:
            x = block(x)
        return self.dimension_switcher(self.norm(x))  # (B, N, E)


if __name__ == "__main__":
    cfg = TokenizerConfig(image_size=32, patch_size=8, encoder_width=64, encoder_depth=2,
                          encoder_heads=4, expert_width=32, expert_heads=4)
    mit = MIT(cfg)
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    changed = images.clone()
    changed[:, :, :8, :8] = 0  # only patch 0
    difference = (mit(images) - mit(changed)).norm(dim=-1)[0].detach()
    print(f"images {tuple(images.shape)} -> x_latent {tuple(mit(images).shape)}, "
          f"{count_parameters(mit):,} parameters")
    print("Change patch 0 alone, and every row of x_latent moves (attention goes both ways):")
    print(difference.view(4, 4).numpy().round(2))
