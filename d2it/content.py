"""The Dynamic Content Transformer: a rough guess for every cell, a better one where it is fine.

    z_t ─► cells ─► DiT blocks over n² cells ─► h ─┬─► coarse head: one code, copied  ─┐
           (B, n², 4C)                             ├─► fine head: four codes           ├─► noise
                                                   └─► RefineNet, fine codes only ─► + ┘

Paper    "rough prediction of noise with detailed regions correction": DiT blocks, a routing by
         grain, RefineNet; 10 + 2 blocks are best of the ways to share DiT-B's 12. Learned positions
In       z_t (B, C, 2n, 2n), t (B,) in 0..T, labels (B,) with `classes` for "none", grain (B, n, n)
Out      what target() of diffusion.py asks for, (B, C, 2n, 2n); constant in coarse blocks
Differs  router and inputs of RefineNet are known by name only; what stands here is our reading:
         the grain chooses the head, RefineNet sees a cell's h, its own noisy codes and places
Try      python -m d2it.content      (CPU, a second)
"""
from collections.abc import Callable

import torch
from torch import Tensor, nn

from config import LABEL_DROPOUT
from d2it.grain import pack, unpack
from d2it.presets import ContentConfig, load_preset
from layers import (
    DiTBlock, LastNorm, TimeEmbedding, as_matrices, as_weights, count_parameters,
    init_vit, patchify, sincos_2d, unpatchify)
from nativetok import as_it_is
from plumbing import checkpoint
from plumbing.flags import build, need
from plumbing.run import unfinished


class RefineNet(nn.Module):
    """Corrections of fine codes: h (B, n², D), cells (B, n², 4C) -> (B, n², 4C), 0 where coarse.

    Fine cells are packed side by side first, so an image pays for the detail that it has.
    """

    def __init__(self, cfg: ContentConfig, channels: int, side: int):
        super().__init__()
        D = cfg.content_width
        self.split = as_matrices(nn.Linear(D, 4 * D), 4)         # a cell's h -> one h for each code
        self.embed = nn.Linear(channels, D)
        # One position for each slot, in the order of cells: (n², 4, D).
        slots = sincos_2d(2 * side, D).T.reshape(1, D, 2 * side, 2 * side)
        self.position = nn.Parameter(patchify(slots, 2).view(side * side, 4, D))
        self.blocks = nn.ModuleList(DiTBlock(D, cfg.content_heads) for _ in range(cfg.refine_depth))
        self.last, self.head = LastNorm(D), nn.Linear(D, channels)

    def forward(self, h: Tensor, cells: Tensor, c: Tensor, grain: Tensor) -> Tensor:
        (B, N, D), C = h.shape, self.embed.in_features
        h, keep, index = pack(h, grain)                       # (B, M, D), M the most of any image
        codes = pack(cells, grain)[0].view(B, -1, 4, C)       # (B, M, 4, C)
        x = self.split(h).view(B, -1, 4, D) + self.embed(codes) + self.position[index]
        x = x.flatten(1, 2)                                   # (B, 4M, D)

        # Filled-up places are seen by none. TRAP: an image without any fine cell would attend to
        # nothing, and a softmax over nothing is NaN; so the first place is always seen.
        seen = keep.repeat_interleave(4, dim=1)
        seen = seen | (torch.arange(seen.shape[1], device=seen.device) == 0)
        for block in self.blocks:
            x = block(x, c, seen[:, None, None])              # mask (B, 1, 1, 4M)
        out = self.head(self.last(x, c)).view(B, -1, 4 * C)   # (B, M, 4C)
        return unpack(out, keep, index, N)


class Content(nn.Module):
    """The whole network. side: n cells on a side; channels: C numbers in a code."""
    unfinished = ""  # how far training had come; load() knows it

    def __init__(self, cfg: ContentConfig, channels: int, side: int, classes: int):
        super().__init__()
        self.cfg, self.channels, self.side, self.classes = cfg, channels, side, classes
        D = cfg.content_width
        self.time, self.label = TimeEmbedding(D), nn.Embedding(classes + 1, D)  # the last: none
        self.embed = nn.Linear(4 * channels, D)
        self.position = nn.Parameter(sincos_2d(side, D))      # (n², D), learned from there on
        self.grain_embed = nn.Embedding(2, D)
        blocks = [DiTBlock(D, cfg.content_heads) for _ in range(cfg.content_depth)]
        self.blocks, self.last = nn.ModuleList(blocks), LastNorm(D)
        self.coarse_head, self.fine_head = nn.Linear(D, channels), nn.Linear(D, 4 * channels)
        self.refine = RefineNet(cfg, channels, side) if cfg.refine_depth else None
        self.init_weights()

    def init_weights(self) -> None:
        """As in DiT: Xavier for matrices; conditions and heads zero, so the first output is zero.

        The first loss is then the mean square of the noise, 1: a check that costs nothing.
        """
        self.apply(init_vit)
        for embedding in (self.label, self.grain_embed, self.time.mlp[0], self.time.mlp[2]):
            nn.init.normal_(embedding.weight, std=0.02)
        heads = [self.coarse_head, self.fine_head] + ([self.refine.head] if self.refine else [])
        for zero in heads + [m.condition[1] for m in self.modules() if hasattr(m, "condition")]:
            nn.init.zeros_(zero.weight)

    def hide_labels(self, labels: Tensor) -> Tensor:
        """In training a share of the labels becomes "none", so that guidance has its other side."""
        if not self.training:
            return labels
        hidden = torch.rand(labels.shape, device=labels.device) < LABEL_DROPOUT
        return labels.masked_fill(hidden, self.classes)

    def forward(self, z_t: Tensor, t: Tensor, labels: Tensor, grain: Tensor,
                refine: bool = True) -> Tensor:
        """refine=False gives the rough prediction alone."""
        c = self.time(t) + self.label(self.hide_labels(labels))       # (B, D)
        z_t = as_weights(z_t, self.position)
        cells, flat = patchify(z_t, 2), grain.flatten(1)              # (B, n², 4C), (B, n²)

        # 1. Rough, everywhere.
        h = self.embed(cells) + self.position + self.grain_embed(flat.long())   # (B, n², D)
        for block in self.blocks:
            h = block(h, c)

        # 2. Routing: a coarse cell owns one code, a fine one four.
        last = self.last(h, c)
        coarse = self.coarse_head(last).repeat(1, 1, 4)               # (B, n², C) -> (B, n², 4C)
        fine = self.fine_head(last)                                   # (B, n², 4C)

        # 3. Correction, where it is fine. Coarse cells are the same bits with and without it.
        if self.refine is not None and refine:
            fine = fine + self.refine(h, cells, c, grain)
        return unpatchify(torch.where(flat[..., None], fine, coarse), 2, 2 * self.side)

    @staticmethod
    def load(path: str, change: Callable = as_it_is) -> "Content":
        """The averaged weights in a checkpoint, in eval mode; .fingerprint is that of its DVAE.

        change   what train.main(change_content=...) was given, if it was given something
        """
        saved = checkpoint.load(path)
        need("content_config" in saved, f"{path} holds no content transformer; give a content.pt")
        cfg = build((ContentConfig,), saved["content_config"])[0]
        model = change(Content(cfg, saved["channels"], saved["side"], len(saved["classes"])))
        checkpoint.load_strict(model, saved["ema"], path)
        model.fingerprint, model.unfinished = saved["dvae"], unfinished(saved, path)
        return model.eval()


if __name__ == "__main__":
    print("Parameters in millions        ours   paper")
    for name, width, depth, refine, heads, paper in (
            ("B", 768, 10, 2, 12, "-"), ("L", 1024, 20, 4, 16, "467"),
            ("XL", 1152, 24, 4, 16, "687")):
        cfg = ContentConfig(content_width=width, content_depth=depth, refine_depth=refine,
                            content_heads=heads)
        with torch.device("meta"):
            count = count_parameters(Content(cfg, channels=4, side=16, classes=1000))
        print(f"  D²iT-{name:3} {depth:3} + {refine} blocks  {count / 1e6:7.1f}   {paper}")

    dvae, cfg, _ = load_preset("d2it-256")
    n = dvae.side
    print("\nTokens times blocks for one image at 256 pixels, by the share of fine cells:")
    for share in (0, 0.25, 0.5, 0.75, 1):
        rough, refined = n * n * cfg.content_depth, round(4 * n * n * share) * cfg.refine_depth
        print(f"  {share:4.0%}  {rough + refined:6,}")
    depth = cfg.content_depth + cfg.refine_depth
    print(f"  a DiT of {depth} blocks on 2x2 patches: {n * n * depth:,}, on single codes: "
          f"{4 * n * n * depth:,}")
    print("\nAgainst patches nothing is saved. So what does the map buy, if it buys anything?")
