"""VectorQuantizer: each vector becomes the nearest entry of a codebook, on the unit sphere.

Paper    Its details are not known to us. The first author's earlier public experiments have
         TiTok's: 4096 l2-normalised codes of 12 channels, commitment weight 0.25. Losses and the
         straight-through estimator are VQ-VAE's (arXiv 1711.00937), normalised codes of few
         channels ViT-VQGAN's (2110.04627).
In       z (B, L, d)                    what the experts put out, any length
Out      z_q (B, L, d), ids (B, L), losses {"codebook", "commitment", "entropy"}
Differs  The first steps of training run without quantization and the codebook is then drawn from
         the encoder's vectors [ours]; codes that nothing chooses move to where vectors are [ours,
         as in Jukebox, 2005.00341]; an entropy loss keeps each position from using few codes, as
         in lookup-free quantizers (MAGVIT-v2, 2310.05737). Trained at full length without it,
         one seed, positions used a third as many codes and pictures were 0.3 dB worse:
         experiments/README.md, "What one change does"; growth has not been tried so [ours].
Try      python quantizer.py
"""
import math
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from config import TokenizerConfig
from layers import at_least_float32

TEMPERATURE = 0.1  # [ours] of the soft choice: a code 0.1 nearer in cosine counts e times as much


class VectorQuantizer(nn.Module):
    """K codes of d channels; a vector takes the one with the largest cosine similarity.

    bypass       while True, z_q is in training z itself (normalised) and the codebook only runs
                 after it; in eval mode vectors become codes all the same
    count        (K,) int64: how often each code was chosen since the last restart_dead_codes()
    recent       (M, d): the vectors of the last training step, from which dead codes are re-drawn
    """

    def __init__(self, cfg: TokenizerConfig):
        super().__init__()
        # (K, d)
        self.codebook = nn.Parameter(
            F.normalize(torch.randn(cfg.codebook_size, cfg.code_dim), dim=-1))
        self.entropy_weight = cfg.entropy_weight  # train.py weighs; 0 saves computing the term
        self.bypass = False
        self.register_buffer("count", torch.zeros(cfg.codebook_size, dtype=torch.int64))
        self.recent = None

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """z (..., d) -> z_q (..., d), ids (...) int64, unweighted losses {name: scalar}."""
        z_q, ids, z = self.quantize(z, self.codes())
        return z_q, ids, self.losses(z, ids)

    def codes(self) -> Tensor:
        """The codebook on the unit sphere: (K, d) float32, or float64 if the codebook is."""
        return F.normalize(at_least_float32(self.codebook), dim=-1)

    def quantize(self, z: Tensor, codes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """z (..., d), codes (K, d) -> z_q (..., d), ids (...), z (..., d) normalised."""
        # Codes lie closer together than bf16 resolves, hence float32 or better.
        with torch.autocast(z.device.type, enabled=False):
            z = F.normalize(z.to(codes.dtype), dim=-1)
            # Between unit vectors |z - e|^2 = 2 - 2 z.e: nearest is the largest dot product.
            ids = (z.detach() @ codes.detach().T).argmax(dim=-1)
            if self.bypass and self.training:
                return z, ids, z
            return self.straight_through(z, F.embedding(ids, codes.detach())), ids, z

    @staticmethod
    def straight_through(z: Tensor, e: Tensor) -> Tensor:
        """z (..., d), its codes e (..., d) -> e, with the gradient of z."""
        if not z.requires_grad:
            return e.detach()
        # argmax has no gradient, so that at z_q is handed to z unchanged.
        return z + (e - z).detach()

    def emit(self, z: Tensor, ids: Tensor | Callable) -> tuple[Tensor, Tensor]:
        """Normalised z (..., d), ids (...) to emit in place of the nearest -> z_q (..., d), ids.

        ids may also be a function that chooses them: z -> ids. With the nearest ones it is to the
        bit what quantize() returns.
        """
        ids = ids(z) if callable(ids) else ids
        return self.straight_through(z, self.lookup(ids)), ids

    def losses(self, z: Tensor, ids: Tensor) -> dict[str, Tensor]:
        """Normalised z (..., d) and its ids (...) -> unweighted losses.

        In training it also counts what was chosen. "entropy" is for training only: it looks at all
        K codes, which an encoder that is only asked for ids should not wait for.
        """
        with torch.autocast(z.device.type, enabled=False):
            e = F.embedding(ids, self.codes())
            if self.training:
                chosen = ids.flatten()  # bincount would make the CPU wait for a GPU
                self.count.scatter_add_(0, chosen, torch.ones_like(chosen))
                self.recent = z.detach().flatten(0, -2)
            losses = {
                "codebook": F.mse_loss(e, z.detach()),  # codes move to the vectors
                # vectors stay near their codes
                "commitment": F.mse_loss(z, e.detach()) * (not self.bypass),
            }
            if self.entropy_weight and self.training:
                losses["entropy"] = self.entropy_loss(z)
            return losses

    def entropy_loss(self, z: Tensor) -> Tensor:
        """Normalised z (B, L, d) -> scalar.

        Over the batch: 0 if each position uses all codes alike, 1 if it always chooses the same.
        1 - entropy / log K of the mean over the batch of softmax(z . e / temperature), a soft
        choice that has a gradient where the hard one has none. It moves the vectors, not the codes.
        """
        # (L, K)
        share = (z @ self.codes().detach().T / TEMPERATURE).softmax(dim=-1).mean(dim=0)
        return 1 - torch.special.entr(share).sum(dim=-1).mean() / math.log(len(self.codebook))

    def lookup(self, ids: Tensor) -> Tensor:
        """ids (...) int64 in 0..K-1 -> z_q (..., d)."""
        return F.embedding(ids, self.codes())

    @torch.no_grad()
    def draw_codebook(self, z: Tensor) -> None:
        """Fill the codebook with rows drawn from z (M, d), the same on every process."""
        self.codebook.copy_(shared_sample(z, len(self.codebook)))
        self.count.zero_()

    @torch.no_grad()
    def restart_dead_codes(self) -> Tensor:
        """Move the codes that no process chose since the last call onto recent vectors.

        -> (K,) bool, which moved
        """
        if dist.is_initialized():
            dist.all_reduce(self.count)
        dead = self.count == 0
        # drawn in any case: all ranks must take part
        fresh = shared_sample(self.recent, len(self.codebook))
        self.codebook[dead] = fresh[dead].to(self.codebook.dtype)
        self.count.zero_()
        return dead


def shared_sample(z: Tensor, amount: int) -> Tensor:
    """`amount` normalised rows drawn from the z (M, d) of all processes: (amount, d).

    The rows are the same everywhere. With fewer vectors than asked for, each is taken again with a
    little noise, so that no two codes are equal.
    """
    z = F.normalize(z.float(), dim=-1).contiguous()
    if dist.is_initialized():
        everyone = [torch.empty_like(z) for _ in range(dist.get_world_size())]
        dist.all_gather(everyone, z)
        z = torch.cat(everyone)
    rounds = -(-amount // len(z))
    order = torch.cat([torch.randperm(len(z)) for _ in range(rounds)])[:amount].to(z.device)
    rows = z[order]                                                           # (amount, d)
    if rounds > 1:
        rows = F.normalize(rows + 0.01 * torch.randn(rows.shape).to(rows), dim=-1)
    if dist.is_initialized():
        dist.broadcast(rows, 0)  # the ranks' random states differ
    return rows


def usage(ids: Tensor, codebook_size: int) -> tuple[float, Tensor]:
    """ids (M, L) -> share of the codebook that occurs at all, perplexity of each position (L,).

    Perplexity is exp(entropy): the number of equally likely codes that would be as hard to guess.
    """
    used = ids.unique().numel() / codebook_size
    counts = [torch.bincount(column, minlength=codebook_size) for column in ids.T]
    share = torch.stack(counts).double() / len(ids)  # (L, K)
    return used, torch.special.entr(share).sum(1).exp()


if __name__ == "__main__":
    torch.manual_seed(0)
    quantizer = VectorQuantizer(TokenizerConfig(codebook_size=8, code_dim=2))
    z = torch.randn(1, 2, requires_grad=True)
    z_q, ids, losses = quantizer(z)
    z_q[0, 0].backward()
    print("codebook of 8 codes on the unit circle:\n", quantizer.codes().detach().numpy().round(2))
    z_then, z_now = z.detach().numpy().round(2), z_q.detach().numpy().round(2)
    print("z", z_then, "-> id", ids.item(), "-> z_q", z_now)
    print("the gradient reached z although argmax has none:", z.grad.numpy().round(2))
    print("log2(8) = 3 bits is all the decoder will ever know of z.")
    print({name: round(loss.item(), 3) for name, loss in losses.items()})
