"""NativeTok: image -> ordered ids -> image.

    images ─► MIT ─► x_latent ─► MoCET ─► ids, z_q ─► Decoder ─► images
              (B, N, E)          (B, L) (B, L, d)

In       images (B, 3, H, W) float32 in [-1, 1]
Out      recon (B, 3, H, W), ids (B, L), losses {"codebook", "commitment", "entropy"}
Paper    NativeTok, arXiv 2601.22837
Differs  cfg.tokenizer "titok" or "titok-causal" puts a baseline in the place of MIT and MoCET, with
         the same quantizer and decoder, so that only the order of the tokens differs [ours]
Try      python nativetok.py
"""
import os
from collections.abc import Callable

import torch
from torch import Tensor, nn

from config import CONFIGS, TokenizerConfig
from decoder import Decoder
from layers import count_parameters, eval_mode
from mit import MIT
from mocet import MoCET
from plumbing import checkpoint
from plumbing.flags import build, need
from plumbing.given import described, need_ids, need_images, need_whole_numbers
from plumbing.images import to_uint8
from plumbing.run import need_parts, unfinished
from quantizer import VectorQuantizer
from titok import TiTok


def as_it_is(model: nn.Module) -> nn.Module:
    """The change that changes nothing: experiments give train.main another one."""
    return model


class NativeTok(nn.Module):
    """The tokenizer as a whole, at the first length of cfg.token_schedule until it grows."""
    unfinished = ""  # how far training had come; load() knows it

    def __init__(self, cfg: TokenizerConfig):
        super().__init__()
        self.cfg = cfg
        # A model is built at the first length, then grown, whatever the length of a checkpoint:
        # the decoder has a table for each growth step, and their names must agree.
        self.num_tokens = cfg.token_schedule[0]
        # MoCET asks the quantizer once per expert, since the next expert reads the code. TiTok asks
        # it once for all tokens. Both get it as an argument, as there is one codebook for all.
        if cfg.tokenizer == "nativetok":
            self.mit, self.mocet = MIT(cfg), MoCET(cfg)
        else:
            self.titok = TiTok(cfg)
        self.quantizer = VectorQuantizer(cfg)
        self.decoder = Decoder(cfg)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """images (B, 3, H, W) -> recon (B, 3, H, W) float32, ids (B, L), unweighted losses."""
        z_q, ids, losses = self.tokenize(images)
        if self.training and self.cfg.tail_drop:
            z_q = self.drop_tails(z_q)
        # Autocast may hand over bf16. Losses of pixels need more than its two to three digits.
        return self.decoder(z_q).float(), ids, losses

    def drop_tails(self, z_q: Tensor) -> Tensor:
        """In some training steps keep the first k ~ U{1..L} tokens only: (B, L, d) -> (B, k, d).

        Whatever the decoder needs most then has to come first, and a prefix becomes a picture.
        The losses of the quantizer keep all tokens [One-D-Piece].
        """
        if torch.rand(()) < self.cfg.tail_drop:  # one k for the batch: a tensor has one length
            z_q = z_q[:, :int(torch.randint(1, self.num_tokens + 1, ()))]
        return z_q

    def tokenize(self, images: Tensor, force: dict[int, Tensor] | None = None
                 ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """images (B, 3, H, W) -> z_q (B, L, d), ids (B, L), losses. A baseline knows no force."""
        if self.cfg.tokenizer == "nativetok":
            return self.mocet(self.mit(images), self.quantizer, force)
        return self.titok(images, self.quantizer)

    def encode(self, images: Tensor, force: dict[int, Tensor] | None = None) -> Tensor:
        """images (B, 3, H, W) -> ids (B, L).

        force   {position from 0: ids (B,)}, an intervention: these tokens are emitted, whatever the
                image is. Later experts read them and answer; a baseline's tokens come all at
                once, so only the forced ones change.
        Raises UserError for what are no images of this size from -1 to 1, and for a position or an
        id that is not there.
        """
        K, force, here = self.cfg.codebook_size, force or {}, self.quantizer.codebook
        need_images(images, self.cfg.image_size, here)
        for i, forced in force.items():
            takes = f"ids ({len(images)},), one for each image, from 0 to {K - 1}"
            need_whole_numbers(f"ids to force at position {i}", forced, here, takes)
            need(forced.shape == (len(images),), f"ids to force at position {i} are "
                 f"{described(forced)}; give {takes}")
            need(0 <= i < self.num_tokens and bool(((0 <= forced) & (forced < K)).all()),
                 f"cannot force position {i}: positions are 0 to {self.num_tokens - 1}, "
                 f"ids 0 to {K - 1}")
        with eval_mode(self):
            ids = self.tokenize(images, force)[1]
        for i, forced in force.items():
            ids[:, i] = forced  # for a baseline: experts have emitted them
        return ids

    def decode(self, ids: Tensor) -> Tensor:
        """ids (B, k), any k from 1 to L -> images (B, 3, H, W).

        Raises UserError for another k, and for what are no ids of this tokenizer.
        """
        need_ids(ids, self.num_tokens, self.cfg.codebook_size, self.quantizer.codebook)
        with eval_mode(self):
            images = self.decoder(self.quantizer.lookup(ids.long())).float()
        need(images.isfinite().all(), "decoded images are not finite (nan or inf); are the "
             "tokenizer's weights those of a training that diverged?")
        return images

    def grow(self, num_tokens: int) -> None:
        """Append experts and decoder positions up to num_tokens; what exists stays as it is."""
        need(self.cfg.tokenizer == "nativetok", f"{self.cfg.tokenizer} cannot grow")
        need(num_tokens > self.num_tokens,
             f"cannot grow from {self.num_tokens} to {num_tokens} tokens")
        # MIT and the codebook do not know how long a sequence is, so they have nothing to grow. An
        # old expert cannot see a new token, so old ids stay the same to the bit until somebody
        # lets old parameters learn again.
        self.mocet.grow(num_tokens)
        self.decoder.grow(num_tokens)
        self.num_tokens = num_tokens

    def grow_to(self, num_tokens: int) -> "NativeTok":
        """Repeat the growth steps of the schedule up to num_tokens.

        A checkpoint of that length needs them all: one step from 32 to 128 makes one table of the
        decoder, two steps make two, and their parameters have other names and shapes.
        """
        for length in self.cfg.token_schedule:
            if self.num_tokens < length <= num_tokens:
                self.grow(length)
        return self

    @staticmethod
    def load(path: str, change: Callable = as_it_is) -> "NativeTok":
        """The tokenizer in a checkpoint, at the length it has reached, in eval mode.

        Its weights are the averaged ones; those that training goes on with are in the file too.
        change   what train.main(change_model=...) was given, if it was given something
        """
        return from_checkpoint(checkpoint.load(path), path, change)

    @staticmethod
    def of_run(folder: str, device: torch.device, change: Callable = as_it_is) -> "NativeTok":
        """The tokenizer in the folder of a run. Raises UserError when there is none."""
        path = os.path.join(folder, "tokenizer.pt")
        need_parts(folder, ("tokenizer.pt",), "train.py")
        return NativeTok.load(path, change).to(device)


def from_checkpoint(saved: dict, path: str, change: Callable = as_it_is) -> NativeTok:
    """checkpoint.load(path) -> the model in it, and its .fingerprint, the name of these weights."""
    need("tokenizer_config" in saved, f"{path} is not a tokenizer checkpoint")
    model = change(NativeTok(build(CONFIGS, saved["tokenizer_config"])[0]))
    model.grow_to(saved["num_tokens"])
    checkpoint.load_strict(model, saved["ema"], path)
    # An id means nothing without the codebook and decoder it was made with. Token caches and
    # generators carry this fingerprint, so ids of one tokenizer never reach another.
    model.fingerprint = checkpoint.fingerprint(saved["ema"], saved["tokenizer_config"])
    model.unfinished = unfinished(saved, path)
    return model.eval()


def sample_batch(model: nn.Module, decode: Callable, labels: Tensor, options: dict, seed: int,
                 b: int) -> Tensor:
    """labels (B,) of batch b -> uint8 (B, H, W, 3) on the CPU.

    decode   (ids, noise) -> images, as flow_decoder.Decoding

    Its noise is a function of (seed, b) alone, so processes may share the batches in any way. It is
    drawn on the CPU, whatever the model runs on: the same seed then gives the same tokens on a CPU
    and on a GPU, but for a choice so close that their rounding decides it.
    """
    noise = torch.Generator("cpu").manual_seed(seed * 1_000_003 + b)
    ids = model.sample(labels, generator=noise, **options)  # (B, L)
    return to_uint8(decode(ids, noise)).cpu()


def doubling(L: int) -> list[int]:
    """Numbers of tokens worth a look: 1, 2, 4, ... and L itself."""
    return [2 ** k for k in range(L.bit_length()) if 2 ** k < L] + [L]


if __name__ == "__main__":
    torch.manual_seed(0)
    cfg = TokenizerConfig(
        image_size=32, patch_size=8, token_schedule=(4, 8), codebook_size=64,
        encoder_width=64, encoder_depth=2, encoder_heads=4, expert_width=64, expert_heads=4,
        decoder_width=64, decoder_depth=2, decoder_heads=4)
    model = NativeTok(cfg)
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    ids = model.encode(images)
    for name, part in (("MIT", model.mit), ("MoCET", model.mocet), ("decoder", model.decoder)):
        print(f"{name:10}{count_parameters(part):>10,} parameters")
    print(f"images {tuple(images.shape)} -> ids {ids.tolist()} "
          f"-> images {tuple(model.decode(ids).shape)}")
    model.grow(8)
    print(f"after grow(8)                -> ids {model.encode(images).tolist()}")
    print("It is longer, and the old part is the same. Would it be, if expert 1 read token 8?")
