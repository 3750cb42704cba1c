"""Decoder: codes back to pixels.

Paper    TiTok's decoder, as in the first author's earlier public experiments: one mask token per
         patch, which knows its place by a position, reads the code tokens through a ViT and is
         turned into its patch's pixels; the code tokens themselves are then dropped
In       z_q (B, k, d), the first k codes of a sequence, 1 <= k <= L
Out      images (B, 3, H, W)
Differs  pixels straight from a linear layer, where TiTok's first stage predicts the tokens of
         another VQGAN; code positions can grow [ours]. Two options for small images [ours]:
         decoder_reads "linear": code i adds a linear map of its own to all patches at once, and the
         ViT runs on patches alone: fewer rows, and no attention has to be learned before a code
         reaches pixels; "both": these maps, zero at first, beside TiTok's attention. Maps take
         L d N D numbers, so they are for short sequences of few patches.
         decoder_overlap m: a patch predicts m pixels of its neighbours too, and overlapping
         predictions are blended, so that no seam shows
Try      python decoder.py      (CPU, a few seconds)
"""
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from config import TokenizerConfig
from layers import (
    ExactBuffers, ViTBlock, as_matrices, as_weights, at_least_float32, count_parameters, init_vit,
    sincos_2d, unpatchify)


class Decoder(ExactBuffers):
    """z_q (B, k, d) for any k up to the length so far -> images (B, 3, H, W)."""

    def __init__(self, cfg: TokenizerConfig):
        super().__init__()
        P, D = cfg.patch_size, cfg.decoder_width
        self.patch_size, self.image_size, self.overlap = P, cfg.image_size, cfg.decoder_overlap
        self.code_dim, reads = cfg.code_dim, cfg.decoder_reads
        self.by_attention, self.by_maps = reads != "linear", reads != "attention"
        self.embed = nn.Linear(cfg.code_dim, D) if self.by_attention else None
        # (N, D) a mask token is its position
        self.mask_tokens = nn.Parameter(sincos_2d(cfg.image_size // P, D))
        # One table per growth step: (new tokens, D) positions, (new tokens, d, N D) maps.
        self.code_pos = nn.ParameterList()
        self.code_to_patch = as_matrices(nn.ParameterList(), 0)  # they read codes
        self.blocks = nn.ModuleList(
            ViTBlock(D, cfg.decoder_heads) for _ in range(cfg.decoder_depth))
        self.norm = nn.LayerNorm(D)
        self.to_pixels = nn.Linear(D, 3 * (P + 2 * self.overlap) ** 2)
        self.register_buffer("window", blending_window(cfg.image_size, P, self.overlap),
                             persistent=False)  # (3 (P+2m)^2, N)
        self.apply(init_vit)
        if self.by_attention:
            # Codes have norm 1, so the embedding gets the gain that brings it to the mask tokens'
            # scale.
            nn.init.normal_(self.embed.weight)
        self.grow(cfg.token_schedule[0])

    def grow(self, num_tokens: int) -> None:
        """Append positions and maps until there are num_tokens; the old ones stay as they are."""
        (N, D), like = self.mask_tokens.shape, self.mask_tokens
        new = num_tokens - sum(map(len, self.code_pos if self.by_attention else self.code_to_patch))
        if self.by_maps:
            maps = torch.randn(new, self.code_dim, N * D, device=like.device)
            # Without attention the sum of the first maps has unit variance. All others start at
            # zero: a grown decoder begins where it stopped.
            maps *= 0 if self.by_attention or len(self.code_to_patch) else num_tokens ** -0.5
            self.code_to_patch.append(nn.Parameter(maps.to(like.dtype)))
        if self.by_attention:
            positions = torch.randn(new, D, device=like.device)
            self.code_pos.append(nn.Parameter(positions.to(like.dtype)))

    def forward(self, z_q: Tensor) -> Tensor:
        z_q = as_weights(z_q, self.mask_tokens)
        k, N = z_q.shape[1], len(self.mask_tokens)
        x = self.mask_tokens
        if self.by_maps:
            maps = torch.cat(list(self.code_to_patch))[:k]
            added = z_q.flatten(1) @ maps.flatten(0, 1).to(z_q.dtype)  # (B, N*D)
            x = x + added.unflatten(1, (N, -1))  # (B, N, D)
        if self.by_attention:
            table = torch.cat(list(self.code_pos))[:k]
            codes = self.embed(z_q) + table  # (B, k, D)
            masks = x.expand(len(z_q), -1, -1).to(codes.dtype)  # (B, N, D)
            x = torch.cat([masks, codes], dim=1)  # (B, N + k, D)
        for block in self.blocks:
            x = block(x)
        pixels = self.to_pixels(self.norm(x[:, :N]))  # (B, N, 3*(P+2m)^2)
        if not self.overlap:
            return unpatchify(pixels, self.patch_size, self.image_size)  # (B, 3, H, W)
        # fold adds up what overlaps, and leaves out what lies beyond the image's edge.
        side = self.patch_size + 2 * self.overlap
        tiles = at_least_float32(pixels).mT * self.window
        return F.fold(tiles, (self.image_size, self.image_size), side, padding=self.overlap,
                      stride=self.patch_size)


def blending_window(image_size: int, patch_size: int, overlap: int) -> Tensor:
    """Weights of the predicted pixels, (3 (P+2m)^2, N); those on one image pixel add up to 1."""
    P, m, S = patch_size, overlap, image_size
    rise = (torch.arange(2 * m) + 0.5) / (2 * m) if m else torch.ones(0)
    line = torch.cat([rise, torch.ones(P - 2 * m), rise.flip(0)])  # (P+2m,) a roof with a flat top
    roof = (line[:, None] * line).flatten()  # ((P+2m)^2,)
    how = dict(kernel_size=P + 2 * m, padding=m, stride=P)
    tiles = roof[:, None].expand(-1, (S // P) ** 2)
    total = F.fold(tiles[None].contiguous(), (S, S), **how)  # 1, but less along the image's edge
    return (tiles * F.unfold(1 / total, **how)[0]).repeat(3, 1)


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
