"""Flow decoder: ids -> a sharp image, drawn from the images that have these ids.

    ids ─► codes z_q ──────────────────────────┐
    ids ─► tokenizer.decode ─► mean, a blur ───┼─► DiT ─► x_hat, the clean image
    x_t, part image, part noise, and its t ────┘

The tokenizer's own decoder is trained by squared error, so it answers with the mean of all images
that have the same ids: a blur, when ids are few. This one draws *one* of those images instead, by
12 steps from noise. What the ids do not say it makes up, so its PSNR is lower, and another noise
gives other details.

Paper    none: NativeTok decodes once. A flow as the decoder of ordered tokens, trained on prefixes
         of them, is FlexTok's; to predict the clean image and weigh it as a velocity is JiT's
In       ids (B, k), any k from 1 to L; the tokenizer is frozen
Out      images (B, 3, H, W)
Differs  from FlexTok: pixels instead of a VAE's latents, and the mean image as a second input: the
         network begins as the mean decoder (its head is zero) and learns the difference. From JiT:
         t runs from clean to noise as in diffusion.py
Try      python flow_decoder.py      (CPU, ten seconds)
"""
import os
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import diffusion
from config import CONFIGS, FlowDecoderConfig, TokenizerConfig
from diffusion import T
from layers import (
    DiTBlock, LastNorm, TimeEmbedding, as_weights, at_least_float32, count_parameters, eval_mode,
    init_vit, patchify, sincos_2d, unpatchify)
from nativetok import NativeTok, doubling
from plumbing import checkpoint
from plumbing.flags import build, need
from plumbing.given import need_generator, need_number
from plumbing.run import unfinished

STEPS = 12  # of Euler's method, where nobody asks for others [ours: experiments/README.md]
SMALLEST = 0.05  # time below which an error no longer weighs more [JiT]


class FlowNet(nn.Module):
    """x_t (B, 3, H, W), t (B,) in 0..T, z_q (B, k, d), mean (B, 3, H, W) -> x_hat (B, 3, H, W)."""

    def __init__(self, cfg: FlowDecoderConfig, tok: TokenizerConfig):
        super().__init__()
        P, D = cfg.flow_decoder_patch_size, cfg.flow_decoder_width
        need(tok.image_size % P == 0, f"image_size {tok.image_size} is not a multiple of "
             f"flow_decoder_patch_size {P}")
        self.patch_size, self.image_size = P, tok.image_size
        self.embed_image = nn.Linear(6 * P * P, D)  # x_t and the mean, side by side
        self.image_pos = nn.Parameter(sincos_2d(tok.image_size // P, D))    # (N, D)
        self.embed_code = nn.Linear(tok.code_dim, D)
        self.code_pos = nn.Parameter(torch.randn(tok.num_tokens, D))        # (L, D)
        self.time = TimeEmbedding(D)
        self.blocks = nn.ModuleList(
            DiTBlock(D, cfg.flow_decoder_heads) for _ in range(cfg.flow_decoder_depth))
        self.last, self.head = LastNorm(D), nn.Linear(D, 3 * P * P)
        self.apply(init_vit)
        nn.init.normal_(self.embed_code.weight)  # codes have norm 1; see decoder.py
        # As in DiT: at first no block changes anything, and the head adds nothing to the mean.
        for zero in [self.head, *(m.condition[1] for m in self.modules()
                                  if hasattr(m, "condition"))]:
            nn.init.zeros_(zero.weight)

    def forward(self, x_t: Tensor, t: Tensor, z_q: Tensor, mean: Tensor) -> Tensor:
        image = as_weights(torch.cat([x_t, mean], dim=1), self.image_pos)   # (B, 6, H, W)
        image = self.embed_image(patchify(image, self.patch_size)) + self.image_pos
        N, k = image.shape[1], z_q.shape[1]
        codes = self.embed_code(as_weights(z_q, self.code_pos)) + self.code_pos[:k]
        x, c = torch.cat([image, codes], dim=1), self.time(t)               # (B, N + k, D), (B, D)
        for block in self.blocks:
            x = block(x, c)
        change = self.head(self.last(x[:, :N], c))                          # (B, N, 3 P P)
        return mean + at_least_float32(unpatchify(change, self.patch_size, self.image_size))


# ------------------------------------------------------------------------------------------------
# learning

def random_times(batch: int, device=None) -> Tensor:
    """(B,) rising times in (0, T), T times the sigmoid of normal numbers: most in the middle [JiT].
    """
    share = (torch.arange(batch, device=device) + torch.rand(batch, device=device)) / batch
    # TRAP: the last share may round to 1, whose normal number is infinite.
    return T * torch.special.ndtri(share.clamp(1e-6, 1 - 1e-6)).sigmoid()


def image_noise(images: Tensor) -> Tensor:
    # TRAP: randn_like draws in the order in which the images lie in memory.
    return torch.randn(images.shape, device=images.device)


def prefix_length(L: int) -> int:
    """How many tokens a training step reads: all L in half of the steps, else 1, 2, 4 ..."""
    lengths = doubling(L)
    return L if torch.rand(()) < 0.5 else lengths[int(torch.randint(len(lengths), ()))]


def loss(net: nn.Module, images: Tensor, z_q: Tensor, mean: Tensor) -> tuple[Tensor, dict]:
    """-> the error of the velocity, a scalar, and that of x_hat in the noisier half of times.

    The straight path is x_t = (1 - s) x + s noise, s = t / T, so its velocity is (x_t - x) / s, and
    |x_hat - x|² / s² is the error of the velocity that x_hat stands for.
    """
    t = random_times(len(images), images.device)                            # (B,)
    s = (t / T).view(-1, 1, 1, 1)
    x_t = (1 - s) * images + s * image_noise(images)
    error = (net(x_t, t, z_q, mean) - images).square().mean(dim=(1, 2, 3))  # (B,)
    weighed = error / (t / T).clamp_min(SMALLEST).square()
    late = t > T / 2
    logs = {"x_error_late": error[late].detach().mean()} if late.any() else {}
    return weighed.mean(), logs


# ------------------------------------------------------------------------------------------------
# drawing

class FlowDecoder:
    """A tokenizer and the FlowNet that has learned with it."""

    def __init__(self, tokenizer: NativeTok, net: FlowNet):
        self.tokenizer, self.net, self.unfinished = tokenizer, net, ""

    def decode(self, ids: Tensor, steps: int = STEPS,
               generator: torch.Generator | None = None) -> Tensor:
        """ids (B, k), any k from 1 to L -> images (B, 3, H, W), drawn.

        steps       of Euler's method, 1 to 1,000; one step gives nearly the mean again
        generator   a CPU's, so that a seed has the same noise on every machine
        Raises UserError for what are no ids of the tokenizer, and for other steps.
        """
        need_number("steps", steps, 1, T, whole=True)
        need_generator(generator)
        mean = self.tokenizer.decode(ids)                                   # checks the ids
        with eval_mode(self.net):
            z_q = self.tokenizer.quantizer.lookup(ids.long())               # (B, k, d)

            def velocity(x_t: Tensor, t: Tensor) -> Tensor:
                return (x_t - self.net(x_t, t, z_q, mean)) * (T / t).view(-1, 1, 1, 1)
            noise = torch.randn(mean.shape, generator=generator).to(mean.device)
            images = diffusion.sample(velocity, noise, "flow", steps)
        need(images.isfinite().all(), "drawn images are not finite (nan or inf); are the flow "
             "decoder's weights those of a training that diverged?")
        return images

    @staticmethod
    def of_run(folder: str, tokenizer: NativeTok) -> "FlowDecoder":
        """The flow decoder in the folder of a run. Raises UserError when there is none."""
        path = os.path.join(folder, "flow-decoder.pt")
        need(checkpoint.exists(path), f"{folder} has no flow decoder; train it: python train.py "
             f"--run {folder} --stage 4 --flow_decoder_steps 2000, or use --decoder mean")
        return FlowDecoder.load(path, tokenizer)

    @staticmethod
    def load(path: str, tokenizer: NativeTok | None = None) -> "FlowDecoder":
        """The averaged weights in a checkpoint, on the device of the tokenizer.

        tokenizer   default: the tokenizer.pt beside it
        Raises UserError for another file, and for another tokenizer than it has learned with.
        """
        saved = checkpoint.load(path)
        need("flow_decoder_config" in saved, f"{path} holds no flow decoder; give a "
             "flow-decoder.pt")
        beside = os.path.join(os.path.dirname(path), "tokenizer.pt")
        tokenizer = tokenizer or NativeTok.load(beside)
        need(saved["tokenizer"] == tokenizer.fingerprint, f"{path} has learned with another "
             "tokenizer than the tokenizer.pt beside it; delete it, then train.py --stage 4 makes "
             "another, or use --decoder mean")
        cfg = build((FlowDecoderConfig,), saved["flow_decoder_config"])[0]
        net = FlowNet(cfg, tokenizer.cfg)
        checkpoint.load_strict(net, saved["ema"], path)
        decoder = FlowDecoder(tokenizer, net.to(tokenizer.quantizer.codebook.device).eval())
        decoder.unfinished = unfinished(saved, path)
        return decoder


# ------------------------------------------------------------------------------------------------
# which decoder a program uses

@dataclass(frozen=True)
class Decoding:
    """ids (B, k), noise -> images (B, 3, H, W): by the mean, or drawn if there is a flow decoder.

    noise   a torch.Generator on the CPU, or None; the mean needs none
    """
    tokenizer: NativeTok
    flow: FlowDecoder | None = None
    steps: int = STEPS

    def __call__(self, ids: Tensor, noise: torch.Generator | None = None) -> Tensor:
        if self.flow:
            return self.flow.decode(ids, self.steps, noise)
        return self.tokenizer.decode(ids)

    @property
    def settings(self) -> dict:
        return {"decoder": "flow", "flow_steps": self.steps} if self.flow else {"decoder": "mean"}

    @property
    def unfinished(self) -> str:
        return "; ".join(filter(None, (self.tokenizer.unfinished,
                                       self.flow and self.flow.unfinished)))

    @staticmethod
    def of_run(folder: str, tokenizer: NativeTok, wanted: str | None = None,
               steps: int | None = None) -> "Decoding":
        """wanted "mean" or "flow"; None: the flow decoder if the run has a finished one.

        Raises UserError for a flow decoder that is not there, and for steps that nothing reads.
        """
        path = os.path.join(folder, "flow-decoder.pt")
        if wanted is None:
            found = checkpoint.exists(path) and checkpoint.load(path).get("phase") == "finished"
            wanted = "flow" if found else "mean"
        need(wanted == "flow" or steps is None, "--flow_steps is for the flow decoder, and this is "
             "--decoder mean; leave it out")
        if wanted == "mean":
            return Decoding(tokenizer)
        return Decoding(tokenizer, FlowDecoder.of_run(folder, tokenizer), steps or STEPS)


if __name__ == "__main__":
    torch.manual_seed(0)
    tok = build(CONFIGS, dict(image_size=8, patch_size=4, token_schedule=[1], code_dim=2))[0]
    cfg = FlowDecoderConfig(flow_decoder_width=32, flow_decoder_depth=2, flow_decoder_heads=2,
                            flow_decoder_patch_size=4)
    net = FlowNet(cfg, tok)
    # One id for all images, and these are of two kinds: white on the left, or on the right.
    left = -torch.ones(3, 8, 8)
    left[:, :, :4] = 1
    kinds = torch.stack([left, left.flip(-1)])
    z_q, mean = torch.ones(32, 1, 2), torch.zeros(32, 3, 8, 8)
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3)
    for _ in range(200):
        value, _ = loss(net, kinds[torch.randint(2, (32,))], z_q, mean)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
    print(f"{count_parameters(net):,} parameters; the mean of the two kinds is gray everywhere.")

    def velocity(x_t: Tensor, t: Tensor) -> Tensor:
        return (x_t - net(x_t, t, z_q, mean)) * (T / t).view(-1, 1, 1, 1)
    for steps in (1, 12):
        images = diffusion.sample(velocity, torch.randn(32, 3, 8, 8), "flow", steps)
        gray = (images.mean(dim=1).clamp(-1, 1) + 1).mul(2).round().int()[:6, 0].tolist()
        print(f"\nThe first row of pixels of six images drawn in {steps} steps:")
        for row in gray:
            print("   ", "".join(" .:*#"[v] for v in row))
    print("\nEvery draw is one of the two. Which of them is right for a given image?")
