"""experiments/search.py: no image gets worse, each choice is the best of those tried, later experts
answer."""
import json

import pytest
import torch
from helpers import refused
from test_intervention import stripes, tokenizer

from experiments import search
from losses import mse
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
