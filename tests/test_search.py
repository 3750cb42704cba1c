"""experiments/search.py: no image gets worse, each choice is the best of those tried, later experts
answer."""
import json
import math
import shutil
import signal

import pytest
import torch
from helpers import refused
from test_intervention import stripes, tokenizer

from config import GeneratorConfig
from experiments import search
from generator import ARGenerator, Generator
from losses import mse
from nativetok import NativeTok
from plumbing.images import to_float

K = 16  # codes of that tokenizer


@pytest.fixture(scope="module")
def model():
    return tokenizer("nativetok")


@pytest.fixture(scope="module")
def images():
    return to_float(stripes(12))


@pytest.mark.parametrize("answer", [True, False])
def test_no_image_gets_worse_and_more_codes_find_more(model, images, answer):
    plain = model.encode(images)
    before = search.errors(model, plain, images)
    one, three = (search.search(model, images, n, answer) for n in (1, 3))
    assert (search.errors(model, one, images) <= before).all() and not torch.equal(one, plain)
    assert search.errors(model, three, images).mean() < search.errors(model, one, images).mean()


def test_with_all_codes_the_last_token_is_the_best_and_the_tokenizer_can_be_made_to_emit_all(
        model, images):
    ids = search.search(model, images, K - 1)
    found = search.errors(model, ids, images)
    assert (found <= search.errors(model, model.encode(images), images)).all()
    forced = model.encode(images, force={i: ids[:, i] for i in range(model.num_tokens)})
    assert torch.equal(forced, ids)
    for code in range(K):
        ids[:, -1] = code
        assert (found <= search.errors(model, ids, images)).all()


def test_later_experts_answer_or_their_tokens_are_held(model, images, monkeypatch):
    """By hand: the second choice of expert 3 for all images, and only there."""
    plain = model.encode(images)
    with torch.no_grad():
        z = {}
        emit = model.quantizer.emit
        monkeypatch.setattr(model.quantizer, "emit",
                            lambda wanted, ids: emit(z.setdefault(len(z), wanted), ids))
        model.mocet(model.mit(images), model.quantizer, {2: plain[:, 2]})
    second = (z[0] @ model.quantizer.codes().T).argsort(descending=True)[:, 1]
    answered = model.encode(images, force={2: second})
    held = plain.clone()
    held[:, 2] = second
    monkeypatch.undo()
    assert not torch.equal(answered, held), "else the two ways are one"

    asked = []
    monkeypatch.setattr(search, "errors", lambda model, ids, images: asked.append(ids.clone())
                        or mse(model.decode(ids), images) + len(asked))  # nothing is better
    search.search(model, images, 1, answer=True)
    search.search(model, images, 1, answer=False)
    L = model.num_tokens
    assert len(asked) == 2 * (1 + L)
    assert torch.equal(asked[3], answered) and torch.equal(asked[1 + L + 3], held)


def test_a_run_from_the_command_line(small_run, tmp_path, capsys):
    out = tmp_path / "search.json"
    search.main(search.parse(["--run", str(small_run), "--nearest", "2", "1", "--num_images", "20",
                              "--json", str(out)]))
    rows = json.loads(out.read_text())["rows"]
    assert [(row["nearest"], row.get("later_tokens")) for row in rows] == [
        (0, None), (1, "hold"), (1, "answer"), (2, "hold"), (2, "answer")]
    assert all(row["psnr"] >= rows[0]["psnr"] for row in rows)
    assert capsys.readouterr().out == f"20 held-out images\n{search.table(rows)}"
    refused(search.main, search.parse(["--run", str(small_run), "--nearest", "999"]), names=["999"])


# ------------------------------------------------------------------------------------------------
# bits with a price

def test_so_many_bits_are_worth_one_dB():
    """Near the error that the price is made for: 53 bits, what 1/1000 dB changes it by, times 1000.
    """
    torch.manual_seed(0)
    ids = torch.randint(16, (2, 8))
    ar = ARGenerator(GeneratorConfig(generator_width=32, generator_depth=1, generator_heads=2), 8,
                     16, 3).eval()
    with torch.no_grad():  # "no class" is the label after the last class
        bits = 8 * ar.loss(ids[:1], torch.tensor([3]))[0].item() / math.log(2)
    error = 0.04
    a_dB = 1000 * (error - error * 10 ** -1e-4)
    price = search.price_of_bits(ar, error, 53.0)
    assert price(ids)[0].item() == pytest.approx(bits / 53 * a_dB, rel=1e-3)
    assert search.price_of_bits(ar, error, math.inf)(ids).tolist() == [0, 0]


def test_what_is_kept_is_the_cheapest_of_error_and_price(model, images):
    """A price of each other code: with a small one both count, with a great one only it does."""
    plain = search.search(model, images, 3)
    def price(ids):
        return (ids % 2).sum(dim=1).double()
    some = search.search(model, images, 3, price=lambda ids: 0.002 * price(ids))
    only = search.search(model, images, 3, price=lambda ids: 1e3 * price(ids))
    assert price(plain).mean() > price(some).mean() > price(only).mean()
    errors = [search.errors(model, ids, images).mean() for ids in (plain, some, only)]
    assert errors == sorted(errors)


def test_a_price_from_the_command_line(small_run, tmp_path, capsys):
    run = shutil.copytree(small_run, tmp_path / "run")
    out = tmp_path / "search.json"
    before = signal.getsignal(signal.SIGTERM)
    search.main(search.parse(["--run", str(run), "--nearest", "2", "--num_images", "20",
                              "--bits_a_db", "1e9", "1", "--json", str(out)]))
    assert signal.getsignal(signal.SIGTERM) == before
    plain, free, dear = json.loads(out.read_text())["rows"]
    assert free["psnr"] >= plain["psnr"] and free["psnr"] > dear["psnr"]
    assert free["bits_before"] > dear["bits_before"] and dear["bits_after"] > 0
    assert (tmp_path / "run-price-1" / "generator-ar.pt").exists()
    refused(Generator.of_run, str(tmp_path / "run-price-1"), "ar",
            NativeTok.load(str(run / "tokenizer.pt")), torch.device("cpu"), names=["another"])


def test_a_baselines_tokens_are_held(images, monkeypatch, capsys):
    model = tokenizer("titok-causal")
    plain, asked, real = model.encode(images), [], search.errors
    monkeypatch.setattr(search, "errors", lambda model, ids, images: asked.append(ids)
                        or real(model, ids, images))
    found = search.search(model, images, K - 1)
    assert all((ids != plain)[:, i // (K - 1):].sum(1).max() == 1
               for i, ids in enumerate(asked[1:])), "one token at a time, no other moves"
    assert {*range(K)} == {ids[0, 0].item() for ids in asked[:K]}, "every code is tried"
    assert not torch.equal(found, plain)
    assert (real(model, found, images) <= real(model, plain, images)).all()

    monkeypatch.setattr(search, "open_run", lambda *_: None)
    monkeypatch.setattr(search, "held_out", lambda *_: (stripes(12), None))
    monkeypatch.setattr(search.NativeTok, "of_run", lambda *_: model)
    search.main(search.parse(["--run", "somewhere"]))
    said = capsys.readouterr().out
    assert "| 1 | hold |" in said and "answer" not in said
