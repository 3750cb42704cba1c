"""evaluation/intervention.py: exactly zero where tokens come at once, exactly what experts that
answer must make of it."""
import math
from types import SimpleNamespace

import pytest
import torch

from config import TokenizerConfig
from evaluation.intervention import interventions
from experiments.order import hide_codes
from nativetok import NativeTok, as_it_is


def tokenizer(name: str, change=as_it_is) -> NativeTok:
    torch.manual_seed(0)
    cfg = TokenizerConfig(
        tokenizer=name, image_size=16, patch_size=8, encoder_width=32, encoder_depth=1,
        encoder_heads=2, expert_width=32, expert_heads=2, token_schedule=(6,), codebook_size=16,
        decoder_width=32, decoder_depth=1, decoder_heads=2, decoder_reads="linear")
    return change(NativeTok(cfg)).eval()


def stripes(n: int) -> torch.Tensor:
    """Images that differ enough for tokens that have learned nothing: uint8 (n, 16, 16, 3)."""
    return torch.randint(256, (n, 1, 16, 3), generator=torch.Generator().manual_seed(1),
                         dtype=torch.uint8).expand(n, 16, 16, 3)


class CoarseAndFine:
    """Two tokens of an even grey: how often 64 goes into it, and what the first leaves, in fours.

    The second expert reads the first token, whatever that is; it cannot say less than 0.
    """
    num_tokens = 2
    quantizer = SimpleNamespace(codebook=torch.zeros(1))

    def encode(self, images, force=None):
        grey = ((images[:, 0, 0, 0] + 1) * 127.5).round().long()
        coarse = (force or {}).get(0, grey // 64)
        fine = (force or {}).get(1, ((grey - 64 * coarse) // 4).clamp(0, 63))
        return torch.stack([coarse, fine], dim=1)

    def decode(self, ids):
        grey = 64 * ids[:, 0] + 4 * ids[:, 1]
        return (grey / 127.5 - 1).view(-1, 1, 1, 1).expand(-1, 3, 2, 2)


def greys(*levels: int) -> torch.Tensor:
    return torch.tensor(levels, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 2, 2, 3)


def db(*errors: float) -> float:
    """PSNR of even pictures that are so many of 255 steps wrong."""
    return 10 * math.log10(255 ** 2 / (sum(error ** 2 for error in errors) / len(errors)))


@pytest.mark.parametrize("name, change", [
    ("titok", as_it_is), ("titok-causal", as_it_is), ("nativetok", hide_codes)])
def test_tokens_that_come_at_once_or_unread_answer_exactly_nothing(name, change):
    rows = interventions(tokenizer(name, change), stripes(300))  # two batches
    assert [row["position"] for row in rows] == [1, 2, 4, 6]
    for row in rows:
        assert row["repaired"] == row["later_ids_changed"] == 0 and row["answered"] == row["broken"]
        assert row["other_id"] > 0, "else nothing was asked"
    assert any(row["broken"] != row["original"] for row in rows)


def test_a_pair_of_experts_repairs_exactly_what_the_second_can():
    # 41: ids 0 10; 81: ids 1 4; both 1 short
    first, last = interventions(CoarseAndFine(), greys(41, 81))
    # 41 gets coarse 1: 64 + 40, then at best 64 + 0. 81 gets coarse 0: 0 + 16, then 0 + 80.
    wanted = {"position": 1, "original": db(1, 1), "broken": db(104 - 41, 81 - 16),
              "answered": db(64 - 41, 81 - 80), "later_ids_changed": 1, "other_id": 1}
    assert first == pytest.approx({**wanted, "repaired": wanted["answered"] - wanted["broken"]},
                                  abs=2e-3)
    assert last["repaired"] == last["later_ids_changed"] == 0, "nobody comes after the last one"
    assert last["broken"] == pytest.approx(db(41 - 16, 104 - 81), abs=1e-3)
    # The token of an image that shares it changes nothing.
    first, _ = interventions(CoarseAndFine(), greys(41, 45, 41))
    assert first["other_id"] == first["later_ids_changed"] == 0
    assert first["original"] == first["broken"] == first["answered"]


def test_the_token_comes_from_the_image_before_in_a_circle():
    model, asked = tokenizer("nativetok"), []
    plain = model.encode
    model.encode = lambda images, force=None: asked.append(force) or plain(images, force=force)
    pixels = stripes(5)
    interventions(model, pixels)
    ids = plain(pixels.permute(0, 3, 1, 2).float() / 127.5 - 1)
    forced = [force for force in asked if force]
    assert [list(force) for force in forced] == [[0], [1], [3], [5]]
    for force in forced:
        for i, emitted in force.items():
            assert torch.equal(emitted, ids[[4, 0, 1, 2, 3], i])
