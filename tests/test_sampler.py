"""Promises of sampler.py: a table of the time of a step whose parts add up, beside an older one."""
import argparse
import json

import pytest
import torch

from config import GeneratorConfig
from experiments import sampler
from experiments.timing import Bench, Operations
from generator import ARGenerator
from helpers import refused

DEPTH = 3


def small() -> ARGenerator:
    torch.manual_seed(0)
    cfg = GeneratorConfig(generator_width=32, generator_depth=DEPTH, generator_heads=2)
    return ARGenerator(cfg, 6, 16, 3).eval()


@pytest.fixture
def bench():
    return Bench(argparse.Namespace(repeats=1, device="cpu", threads=0))


def test_operations_are_counted_with_those_of_the_gradient():
    weight, x = torch.randn(4, 8, requires_grad=True), torch.randn(2, 8)
    with Operations() as done:
        (x @ weight.T).sum().backward()
    product = torch.ops.aten.mm.default
    assert done.calls[product] == 2, "one forward, one for the weight's gradient"
    assert done.seconds[product] > 0


def test_the_parts_of_a_step_add_up_and_every_product_is_counted(bench):
    made = sampler.profile(small(), 2, bench)
    # Two sides of guidance are one batch: of a block's products the two of attention are apart.
    products = made["calls"]["matrix products"] + made["calls"]["attention"]
    assert products >= 4 * DEPTH + 1
    assert sum(made["ms"].values()) >= 0.99 * made["whole"] - 0.02
    assert made["calls"]["views"] > 0 and made["calls"]["moving numbers"] > 0


def test_the_table_shows_what_was_before_what_is(bench, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sampler, "generator_of", lambda Kind, bench: small())
    monkeypatch.setattr(sampler, "CASES", {"one": (1, torch.float32)})
    flags = ["--device", "cpu", "--repeats", "1", "--json"]
    sampler.main([*flags, str(tmp_path / "old.json")])
    assert "→" not in capsys.readouterr().out
    sampler.main([*flags, str(tmp_path / "new.json"), "--before", str(tmp_path / "old.json")])
    assert capsys.readouterr().out.count("→") == 2 + len(sampler.KINDS)
    old, new = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("old", "new"))
    assert new["before"] == old["now"] and old["before"] is None
    assert new["now"]["commit"] and "--before" in new["command"]
    sampler.main(["--show", str(tmp_path / "new.json"), "--out", str(tmp_path / "bars.svg")])
    assert "→" in capsys.readouterr().out
    bars = (tmp_path / "bars.svg").read_text()
    assert bars.count("<rect") == 1 + 3 * (1 + len(sampler.KINDS)), "two bars and a legend"
    assert "one, before" in bars and "one, now" in bars


@pytest.mark.parametrize("wrong, says", [
    (("--show", "gone.json"), ("gone.json",)), (("--before", "gone.json"), ("gone.json",)),
    (("--show", __file__, "--json", "x.json"), ("--show", "--json"))])
def test_wrong_use_gets_one_line(wrong, says):
    refused(sampler.parse, wrong, names=says)
