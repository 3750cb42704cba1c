"""NativeTok: image -> ordered ids -> image.

    images ─► MIT ─► x_latent ─► MoCET ─► ids, z_q ─► Decoder ─► images
              (B, N, E)          (B, L) (B, L, d)

In       images (B, 3, H, W) float32 in [-1, 1]
Out      recon (B, 3, H, W), ids (B, L), losses {"codebook", "commitment", "entropy"}
Source   NativeTok, arXiv 2601.22837; cfg.tokenizer "titok" or "titok-causal" puts a baseline in the
         place of MIT and MoCET, with the same quantizer and decoder
Try      python nativetok.py
"""
import os

import torch
from torch import Tensor, nn

from config import CONFIGS, TokenizerConfig
from decoder import Decoder
from layers import count_parameters
from mit import MIT
from mocet import MoCET
from plumbing import checkpoint
from plumbing.flags import build, need
from plumbing.images import to_uint8
from quantizer import VectorQuantizer
from titok import TiTok


class NativeTok(nn.Module):
    """The tokenizer as a whole, at the first length of cfg.token_schedule until grow() is called."""

    def __init__(self, cfg: TokenizerConfig):
        super().__init__()
        self.cfg = cfg
        self.num_tokens = cfg.token_schedule[0]
        if cfg.tokenizer == "nativetok":
            self.mit, self.mocet = MIT(cfg), MoCET(cfg)
        else:
            self.titok = TiTok(cfg)
        self.quantizer = VectorQuantizer(cfg)
        self.decoder = Decoder(cfg)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """images (B, 3, H, W) -> recon (B, 3, H, W) float32, ids (B, L), unweighted losses."""
        z_q, ids, losses = self.tokenize(images)
        if self.training and self.cfg.tail_drop and torch.rand(()) < self.cfg.tail_drop:
            k = int(torch.randint(1, self.num_tokens + 1, ()))
            z_q = z_q[:, :k]  # the decoder gets the first k tokens only
        return self.decoder(z_q).float(), ids, losses

    def tokenize(self, images: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """images (B, 3, H, W) -> z_q (B, L, d), ids (B, L), losses."""
        if self.cfg.tokenizer == "nativetok":
            return self.mocet(self.mit(images), self.quantizer)
        return self.titok(images, self.quantizer)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """images (B, 3, H, W) -> ids (B, L). Raises UserError for images of another size."""
        size = self.cfg.image_size
        need(images.shape[1:] == (3, size, size), f"images are {tuple(images.shape)}, this tokenizer takes (B, 3, {size}, {size})")
        with eval_mode(self):
            return self.tokenize(images)[1]

    @torch.no_grad()
    def decode(self, ids: Tensor) -> Tensor:
        """ids (B, k), any k from 1 to L -> images (B, 3, H, W). Raises UserError for another k."""
        need(1 <= ids.shape[1] <= self.num_tokens, f"{ids.shape[1]} tokens cannot be decoded, only 1 to {self.num_tokens}")
        with eval_mode(self):
            return self.decoder(self.quantizer.lookup(ids)).float()

    def grow(self, num_tokens: int) -> None:
        """Append experts and decoder positions until there are num_tokens; what exists stays as it is."""
        need(self.cfg.tokenizer == "nativetok", f"{self.cfg.tokenizer} cannot grow")
        need(num_tokens > self.num_tokens, f"cannot grow from {self.num_tokens} to {num_tokens} tokens")
        self.mocet.grow(num_tokens)
        self.decoder.grow(num_tokens)
        self.num_tokens = num_tokens

    def grow_to(self, num_tokens: int) -> "NativeTok":
        """Repeat the growth steps of the schedule up to num_tokens, as a checkpoint of that length needs them."""
        for length in self.cfg.token_schedule:
            if self.num_tokens < length <= num_tokens:
                self.grow(length)
        return self

    @staticmethod
    def load(path: str) -> "NativeTok":
        """The averaged weights in a tokenizer checkpoint, at the length it has reached, in eval mode."""
        return from_checkpoint(checkpoint.load(path), path)

    @staticmethod
    def of_run(folder: str, device: torch.device) -> "NativeTok":
        """The tokenizer in the folder of a run. Raises UserError when there is none."""
        path = os.path.join(folder, "tokenizer.pt")
        need(checkpoint.exists(path), f"{folder} has no tokenizer.pt; train one: python train.py --run {folder}")
        return NativeTok.load(path).to(device)


def from_checkpoint(saved: dict, path: str) -> NativeTok:
    """checkpoint.load(path) -> the model in it, with .fingerprint: what names these very weights in caches and generators."""
    need("tokenizer_config" in saved, f"{path} is not a tokenizer checkpoint")
    model = NativeTok(build(CONFIGS, saved["tokenizer_config"])[0]).grow_to(saved["num_tokens"])
    checkpoint.load_strict(model, saved["ema"], path)
    model.fingerprint = checkpoint.fingerprint(saved["ema"], saved["tokenizer_config"])
    return model.eval()


def sample_batch(model: nn.Module, tokenizer: NativeTok, labels: Tensor, options: dict, seed: int, b: int) -> Tensor:
    """labels (B,) of batch b -> uint8 (B, H, W, 3) on the CPU. Its noise is a function of (seed, b) alone."""
    noise = torch.Generator(labels.device).manual_seed(seed * 1_000_003 + b)
    return to_uint8(tokenizer.decode(model.sample(labels, generator=noise, **options))).cpu()


def doubling(L: int) -> list[int]:
    """Numbers of tokens worth a look: 1, 2, 4, ... and L itself."""
    return [2 ** k for k in range(L.bit_length()) if 2 ** k < L] + [L]


class eval_mode:
    """with eval_mode(model): no dropout, no tail drop, no counting, no continuous codes; afterwards as before."""

    def __init__(self, model: NativeTok):
        self.model = model

    def __enter__(self):
        self.training, self.continuous = self.model.training, self.model.quantizer.continuous
        self.model.eval()
        self.model.quantizer.continuous = False

    def __exit__(self, *error):
        self.model.train(self.training)
        self.model.quantizer.continuous = self.continuous


if __name__ == "__main__":
    torch.manual_seed(0)
    cfg = TokenizerConfig(image_size=32, patch_size=8, encoder_width=64, encoder_depth=2, encoder_heads=4, expert_width=64, expert_heads=4,
                          token_schedule=(4, 8), codebook_size=64, decoder_width=64, decoder_depth=2, decoder_heads=4)
    model = NativeTok(cfg)
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    ids = model.encode(images)
    print(f"{'MIT':10}{count_parameters(model.mit):>10,} parameters\n{'MoCET':10}{count_parameters(model.mocet):>10,}\n"
          f"{'decoder':10}{count_parameters(model.decoder):>10,}")
    print(f"images {tuple(images.shape)} -> ids {ids.tolist()} -> images {tuple(model.decode(ids).shape)}")
    model.grow(8)
    print(f"after grow(8)                -> ids {model.encode(images).tolist()}: longer, and the old part is the same")
