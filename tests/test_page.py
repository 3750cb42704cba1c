"""explain.py's page in a real browser: what a reader clicks shows the numbers of Python."""
import math

import pytest
import torch

import explain
from browser import read_page
from config import CONFIGS, TokenizerConfig
from evaluation.interactive import donors_of
from evaluation.intervention import errors, intervene, interventions
from flow_decoder import Decoding
from generator import Generator
from helpers import called
from losses import to_db
from nativetok import NativeTok
from plumbing.images import to_float
from plumbing.page import Page
from plumbing.run import open_run

pytestmark = pytest.mark.page
CPU = torch.device("cpu")
SAID = """read.NAME = {lost: number("lost"), recovered: number("recovered"),
  changed: number("changed"), filled: document.querySelectorAll("#change-chips .changed").length,
  captions: at("change-pictures").textContent, address: location.hash};"""


@pytest.fixture(scope="module")
def made(small_run, tmp_path_factory):
    """The page, its tokenizer, its AR model, the held-out images, their labels and ids."""
    out = tmp_path_factory.mktemp("page")
    code, _, err = called(explain, "--run", small_run, "--images", 3, "--out", out,
                          "--decoder", "mean")
    assert code == 0, err
    model = NativeTok.of_run(str(small_run), CPU)
    ar = Generator.of_run(str(small_run), "ar", model, CPU)
    pixels, labels = explain.held_out(open_run(str(small_run), CONFIGS))
    pixels, labels = pixels[:250], labels[:250]
    return out / "index.html", model, ar, pixels, labels, model.encode(to_float(pixels))


def swapped(model, pixels, ids, k: int, token: int, donor: int) -> dict:
    """What the page has to say of image k, `token` from 1, and its donor from 0."""
    d = donors_of(ids[:, token - 1].tolist(), k, 3)[donor]
    x, own = to_float(pixels[k:k + 1]), ids[k:k + 1]
    broken, answered = intervene(model, x, own, token, ids[d:d + 1, token - 1])
    dB = [round(to_db(errors(model, i, x)).item(), 2) for i in (own, broken, answered)]
    changed = int((answered != own)[:, token:].sum())
    return {"lost": dB[0] - dB[1], "recovered": dB[2] - dB[1], "changed": changed, "dB": dB}


def check(read: dict, wanted: dict) -> None:
    for name in ("lost", "recovered"):
        assert read[name] == pytest.approx(wanted[name], abs=0.006), name
    assert read["changed"] == read["filled"] == wanted["changed"]
    for dB in wanted["dB"]:
        assert f"{dB:.2f} dB" in read["captions"]


def test_it_opens_with_token_1_swapped_and_a_click_swaps_another(made, tmp_path):
    page, model, _, pixels, _, ids = made
    read = read_page(page, tmp_path, SAID.replace("NAME", "first") + """
      chip("change-chips", 3).click();
      read.atOnce = number("changed");
      await wait(3000);""" + SAID.replace("NAME", "third") + """
      chip("change-chips", 3).click();
      await wait(3000);""" + SAID.replace("NAME", "again") + """
      at("images").children[2].click();""" + SAID.replace("NAME", "other"))
    rows = [swapped(model, pixels, ids, k, 1, 0) for k in range(8)]
    best = max(range(8), key=lambda k: rows[k]["recovered"])
    check(read["first"], rows[best])
    check(read["third"], swapped(model, pixels, ids, best, 3, 0))
    donors = len(donors_of(ids[:, 2].tolist(), best, 3))
    check(read["again"], swapped(model, pixels, ids, best, 3, 1 % donors))
    check(read["other"], swapped(model, pixels, ids, 2, 3, 1 % len(
        donors_of(ids[:, 2].tolist(), 2, 3))))
    assert read["atOnce"] == 0, "chips turn one after the other"
    assert "token=3" in read["again"]["address"] and "image=2" in read["other"]["address"]


def test_arrow_keys_move_a_link_opens_its_state_and_who_wants_no_motion_gets_none(made, tmp_path):
    page, model, _, pixels, _, ids = made
    read = read_page(page, tmp_path, SAID.replace("NAME", "linked") + """
      const press = key => document.activeElement.dispatchEvent(
        new KeyboardEvent("keydown", {key, bubbles: true}));
      const place = () => [...at("change-chips").children].indexOf(document.activeElement) + 1;
      chip("change-chips", 2).focus();
      press("ArrowRight"); read.right = place();
      press("ArrowLeft"); press("ArrowLeft"); press("ArrowLeft"); read.left = place();
      read.kinds = [...document.querySelectorAll(".chips > *")].map(x => x.tagName);
      chip("change-chips", 1).click();""" + SAID.replace("NAME", "atOnce"),
        "#image=1&token=2&donor=0", "--force-prefers-reduced-motion")
    check(read["linked"], swapped(model, pixels, ids, 1, 2, 0))
    check(read["atOnce"], swapped(model, pixels, ids, 1, 1, 0))
    assert (read["right"], read["left"]) == (3, model.num_tokens), "round the end"
    assert set(read["kinds"]) == {"BUTTON"}, "Enter and Space click a button by themselves"


def test_the_slider_shows_decibels_and_bits_of_a_prefix(made, tmp_path):
    page, model, ar, pixels, labels, ids = made
    read = read_page(page, tmp_path, """
      const slider = at("prefix-slider");
      slider.value = 3;
      slider.dispatchEvent(new Event("input"));
      Object.assign(read, {k: at("prefix-k").textContent, bits: number("bits"),
        spent: number("spent"), captions: at("prefix-pictures").textContent,
        pixel: [...document.querySelectorAll("#prefix-pictures canvas")].map(canvas =>
          [...canvas.getContext("2d").getImageData(0, 0, 32, 32).data])});""", "#image=4")
    x = to_float(pixels[4:5])
    dB = to_db(errors(model, ids[4:5, :3], x)).item()
    assert f"{dB:.2f} dB" in read["captions"] and read["k"] == f"3 of {model.num_tokens}"
    assert read["bits"] == 3 * math.log2(model.cfg.codebook_size)
    with torch.no_grad():
        nats = ar.loss(ids[4:5], labels[4:5])[1]["nll_by_position"][:3].sum().item()
    assert read["spent"] == pytest.approx(nats / math.log(2), abs=0.06)
    original, shown, _ = torch.tensor(read["pixel"]).view(3, 32, 32, 4)[..., :3].float()
    decoded = explain.decode(model, ids[4:5, :3])[0].float()
    assert (original - pixels[4]).abs().mean() < 6 and (shown - decoded).abs().mean() < 6, "a JPEG"


def test_a_chip_that_has_the_focus_shows_where_its_expert_looks(made, tmp_path):
    page, model, _, pixels, _, _ = made
    read = read_page(page, tmp_path, """
      chip("look-chips", 4).dispatchEvent(new Event("mouseenter"));
      Object.assign(read, {patches: number("on-patches"), tokens: number("on-tokens"),
        bars: [...document.querySelectorAll("#look-chips small")].map(x => x.textContent)});""",
                     "#image=1")
    trace = []
    with torch.no_grad():
        model.mocet.forward_loop(model.mit(to_float(pixels[1:2])), model.quantizer, trace)
    last = trace[4 * model.cfg.expert_depth - 1].mean(dim=1)[0]
    N = model.cfg.num_patches
    assert read["patches"] == pytest.approx(100 * last[:N].sum().item(), abs=0.6)
    assert read["tokens"] == pytest.approx(100 * last[N:-1].sum().item(), abs=0.6)
    bars = [int(bar.strip("%")) for bar in read["bars"][:3]]
    assert bars == pytest.approx([100 * w for w in last[N:-1].tolist()], abs=0.6)


def test_three_choices_cost_the_bits_of_the_ar_model_and_then_it_finishes(made, tmp_path):
    page, model, ar, *_ = made
    read = read_page(page, tmp_path, """
      const pick = n => at("write-choices").children[n].click();
      pick(1); pick(0); pick(4);
      read.bits = number("written");
      read.figures = at("write-choices").querySelectorAll("figure").length;
      at("write-again").click();
      read.again = at("write-choices").querySelectorAll("button").length;""")
    ids, bits = torch.empty(1, 0, dtype=torch.long), 0
    for n in (1, 0, 4):
        with torch.no_grad():
            p, new = ar(torch.zeros(1, dtype=torch.long), ids)[0, -1].softmax(dim=-1).topk(5)
        ids, bits = torch.cat([ids, new[None, n:n + 1]], dim=1), bits - p[n].log2().item()
    assert read["bits"] == pytest.approx(bits, abs=0.06)
    assert (read["figures"], read["again"]) == (2, 5)


def test_no_chip_of_unordered_tokens_turns(tmp_path):
    from evaluation.interactive import sections
    models = []
    for name in ("nativetok", "titok"):
        torch.manual_seed(0)
        models.append(NativeTok(TokenizerConfig(
            tokenizer=name, image_size=32, patch_size=8, encoder_width=32, encoder_depth=1,
            encoder_heads=2, expert_width=32, expert_heads=2, token_schedule=(6,), codebook_size=16,
            decoder_width=32, decoder_depth=1, decoder_heads=2, decoder_reads="linear")).eval())
    noise = torch.Generator().manual_seed(1)
    pixels = torch.randint(256, (12, 1, 32, 3), generator=noise, dtype=torch.uint8)
    pixels = pixels.repeat(1, 32, 1, 1)  # stripes
    ids = [model.encode(to_float(pixels)) for model in models]
    page = Page(str(tmp_path / "page"), 32, intro="Made by: python a test")
    sections(page, models, Decoding(models[0]), pixels, ids, interventions(models[0], pixels)[0],
             None, None)
    read = read_page(tmp_path / "page" / "index.html", tmp_path, """
      at("models").children[1].click();
      await wait(3000);""" + SAID.replace("NAME", "unordered") + """
      at("models").children[0].click();
      await wait(3000);""" + SAID.replace("NAME", "ordered"), "#image=3&token=2&donor=0")
    check(read["unordered"], swapped(models[1], pixels, ids[1], 3, 2, 0))
    check(read["ordered"], swapped(models[0], pixels, ids[0], 3, 2, 0))
    assert read["unordered"]["changed"] == read["unordered"]["recovered"] == 0
