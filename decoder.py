"""Decoder: codes back to pixels.

In       z_q (B, k, d), the first k codes of a sequence, 1 <= k <= L
Out      images (B, 3, H, W)
How      one mask token per patch, told its place by a position, reads the code tokens through a ViT
         and is turned into its patch's pixels; the code tokens themselves are then dropped  [TiTok]
Differs  pixels straight from a linear layer, where TiTok's first stage predicts the tokens of another
         VQGAN; code positions can grow [ours]
Try      python decoder.py
"""
import torch
from torch import Tensor, nn

from config import TokenizerConfig
from layers import ViTBlock, count_parameters, init_vit, sincos_2d, unpatchify


class Decoder(nn.Module):
    """z_q (B, k, d) for any k up to the length so far -> images (B, 3, H, W)."""

    def __init__(self, cfg: TokenizerConfig):
        super().__init__()
        P, D = cfg.patch_size, cfg.decoder_width
        self.patch_size, self.image_size = P, cfg.image_size
        self.embed = nn.Linear(cfg.code_dim, D)
        # (N, D) a mask token is its position
        self.mask_tokens = nn.Parameter(sincos_2d(cfg.image_size // P, D))
        self.code_pos = nn.ParameterList()  # one (new tokens, D) table per growth step
        self.blocks = nn.ModuleList(ViTBlock(D, cfg.decoder_heads) for _ in range(cfg.decoder_depth))
        self.norm = nn.LayerNorm(D)
        self.to_pixels = nn.Linear(D, 3 * P * P)
        # Codes have norm 1, so the embedding gets the gain that brings it to the mask tokens'
        # scale.
        self.apply(init_vit)
        nn.init.normal_(self.embed.weight)
        self.grow(cfg.token_schedule[0])

    def grow(self, num_tokens: int) -> None:
        """Append positions until there are num_tokens; the old ones stay as they are."""
        new = num_tokens - sum(len(table) for table in self.code_pos)
        self.code_pos.append(nn.Parameter(torch.randn(new, self.embed.out_features, device=self.embed.weight.device)))

    def forward(self, z_q: Tensor) -> Tensor:
        k, N = z_q.shape[1], len(self.mask_tokens)
        # All tables are joined before the cut, so that each of them gets a (maybe zero) gradient at
        # every step.
        codes = self.embed(z_q) + torch.cat(list(self.code_pos))[:k]          # (B, k, D)
        masks = self.mask_tokens.expand(len(z_q), -1, -1).to(codes.dtype)     # (B, N, D)
        x = torch.cat([masks, codes], dim=1)                                  # (B, N + k, D)
        for block in self.blocks:
            x = block(x)
        pixels = self.to_pixels(self.norm(x[:, :N]))                          # (B, N, P*P*3)
        return unpatchify(pixels, self.patch_size, self.image_size)           # (B, 3, H, W)


if __name__ == "__main__":
    cfg = TokenizerConfig(image_size=32, patch_size=8, token_schedule=(8, 16), decoder_width=64, decoder_depth=2, decoder_heads=4)
    decoder = Decoder(cfg)
    z_q = torch.nn.functional.normalize(torch.randn(2, 8, cfg.code_dim), dim=-1)
    print(f"{count_parameters(decoder):,} parameters; any prefix of the codes is a picture:")
    for k in (1, 4, 8):
        print(f"  z_q {tuple(z_q[:, :k].shape)} -> images {tuple(decoder(z_q[:, :k]).shape)}")
    decoder.grow(16)
    print("after grow(16) it knows the positions of", sum(len(t) for t in decoder.code_pos), "codes")
