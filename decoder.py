"""Decoder: codes back to pixels.

Paper    TiTok's decoder, as in the first author's earlier public experiments: one mask token per
         patch, which knows its place by a position, reads the code tokens through a ViT and is
         turned into its patch's pixels; the code tokens themselves are then dropped
In       z_q (B, k, d), the first k codes of a sequence, 1 <= k <= L
Out      images (B, 3, H, W)
Differs  pixels straight from a linear layer, where TiTok's first stage predicts the tokens of
         another VQGAN; code positions can grow [ours]
Try      python decoder.py      (CPU, a few seconds)
"""
import torch
import torch.nn.functional as F
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
        self.blocks = nn.ModuleList(
            ViTBlock(D, cfg.decoder_heads) for _ in range(cfg.decoder_depth))
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
        D, device = self.embed.out_features, self.embed.weight.device
        self.code_pos.append(nn.Parameter(torch.randn(new, D, device=device)))

    def forward(self, z_q: Tensor) -> Tensor:
        k, N = z_q.shape[1], len(self.mask_tokens)
        # All tables are joined before the cut, so that each of them gets a (maybe zero) gradient at
        # every step.
        codes = self.embed(z_q) + torch.cat(list(self.code_pos))[:k]  # (B, k, D)
        masks = self.mask_tokens.expand(len(z_q), -1, -1).to(codes.dtype)  # (B, N, D)
        x = torch.cat([masks, codes], dim=1)  # (B, N + k, D)
        for block in self.blocks:
            x = block(x)
        pixels = self.to_pixels(self.norm(x[:, :N]))  # (B, N, P*P*3)
        return unpatchify(pixels, self.patch_size, self.image_size)  # (B, 3, H, W)


if __name__ == "__main__":
    torch.manual_seed(0)
    cfg = TokenizerConfig(image_size=16, patch_size=4, token_schedule=(2, 4), code_dim=4,
                          decoder_width=32, decoder_depth=1, decoder_heads=2)
    decoder = Decoder(cfg)
    decoder.grow(4)
    # A disc and a ring, and four random codes for each; their first two codes are the same.
    z_q = F.normalize(torch.randn(2, 4, 4), dim=-1)
    z_q[1, :2] = z_q[0, :2]
    x = torch.linspace(-1, 1, 16)
    radius = x[:, None].hypot(x)
    images = torch.stack([radius < 0.9, (radius < 0.9) & (radius > 0.5)]).float()  # (2, 16, 16)
    images = images[:, None].expand(-1, 3, -1, -1) * 2 - 1

    # Learn both by heart, from a prefix of random length in each step.
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=1e-2)
    for _ in range(300):
        k = int(torch.randint(1, 5, ()))
        loss = (decoder(z_q[:, :k]) - images).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    print(f"{count_parameters(decoder):,} parameters have learned a disc and a ring by heart, "
          "whose first two codes are the same.")
    for k in (2, 3):
        print(f"\nThe first {k} of 4 codes as pictures:")
        gray = decoder(z_q[:, :k]).mean(dim=1).clamp(-1, 1)[:, ::2]  # (2, 8, 16), every other row
        shades = (gray + 1).mul(2).round().int().tolist()  # 0 to 4
        for disc, ring in zip(*shades):
            print("   ", "".join(" .:*#"[s] for s in disc), "".join(" .:*#"[s] for s in ring))
    print("\nWhile codes are the same, a decoder can do no better than the mean of both.\n"
          "Which codes should come first?")
