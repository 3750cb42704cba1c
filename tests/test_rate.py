"""experiments/rate.py: the rate reaches the token that is guessed; the codebook stays."""
import json
import shutil

import torch
from helpers import refused
from test_intervention import tokenizer

from config import GeneratorConfig
from experiments import rate
from generator import ARGenerator
from nativetok import NativeTok


def test_a_price_moves_each_token_towards_codes_that_the_prior_expects():
    torch.manual_seed(0)
    plain = tokenizer("nativetok")
    L, K = plain.num_tokens, plain.cfg.codebook_size
    cfg = GeneratorConfig(generator_width=32, generator_depth=1, generator_heads=2,
                          generator_dropout=0.0)
    ar = ARGenerator(cfg, L, K, 3)
    model = rate.charged(plain, ar)
    z = torch.randn(2, L, model.cfg.code_dim)
    z = torch.nn.functional.normalize(z, dim=-1).requires_grad_(True)
    ids = torch.randint(K, (2, L))
    model.train()
    nats = model.quantizer.losses(z, ids)["rate"]
    logits = ar(torch.full((2,), 3), ids[:, :-1]).log_softmax(dim=-1)
    by_hand = sum(-(logits[b, i] * (z[b, i] @ model.quantizer.codes().T / rate.SOFT).softmax(0))
                  .sum() for b in range(2) for i in range(L)) / 2
    torch.testing.assert_close(nats, by_hand)
    nats.backward()
    assert (z.grad.abs().sum(dim=-1) > 0).all() and model.quantizer.codebook.grad is None
    assert "rate" not in model.eval().quantizer.losses(z, ids)


def test_a_row_from_the_command_line(small_run, tmp_path, capsys):
    run, out = shutil.copytree(small_run, tmp_path / "run"), tmp_path / "rate.json"
    rate.main(rate.parse(["--run", str(run), "--steps", "20", "--num_images", "20", "--bits_a_db",
                          "1e9", "0.5", "--json", str(out)]))
    free, dear = json.loads(out.read_text())["rows"]
    assert free["psnr"] > dear["psnr"] and free["bits"] > dear["bits"]
    share = (free["bits"] - dear["bits"]) / (free["psnr"] - dear["psnr"])
    assert capsys.readouterr().out.endswith(f" | {share:.0f} |\n")
    refused(rate.main, rate.parse(["--run", str(run), "--steps", "21", "--bits_a_db", "1e9"]),
            names=["run-rate-1e+09", "--steps"])
    refused(rate.parse, ["--run", str(run), "--bits_a_db", "0.5"], names=["control"])
    old, new = (NativeTok.load(str(tmp_path / name / "tokenizer.pt"))
                for name in ("run", "run-rate-0.5"))
    assert torch.equal(old.quantizer.codebook, new.quantizer.codebook)
    assert not torch.equal(old.mocet.embed_code.weight, new.mocet.embed_code.weight)
