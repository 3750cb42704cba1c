"""The tables of the pages hold what is counted here, or what result files say, cell by cell."""
import contextlib
import itertools
import json
import re
import statistics
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import config
import train
from experiments import bench, flow, grain, grain_table, order, order_table, search
from generator import ARGenerator
from layers import count_parameters
from nativetok import NativeTok

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "experiments" / "results"
README = (ROOT / "README.md").read_text(encoding="utf-8")
RECORDS = (ROOT / "experiments" / "RECORDS.md").read_text(encoding="utf-8")
MEASURED = (ROOT / "experiments" / "README.md").read_text(encoding="utf-8")
SPEED = (ROOT / "experiments" / "SPEED.md").read_text(encoding="utf-8")
IMAGENET = (ROOT / "experiments" / "IMAGENET.md").read_text(encoding="utf-8")


def section(title: str, page: str = MEASURED) -> str:
    """The text under a heading of the second level."""
    return page.split(f"\n## {title}\n")[1].split("\n## ")[0]


def tables(text: str) -> list[list[list[str]]]:
    """Every table in a text, without its head: rows of cells."""
    found = []
    for block in re.findall(r"(?:^\|.*\n?)+", text, flags=re.M):
        rows = [line.strip("|").split("|") for line in block.splitlines()[2:]]
        found.append([[cell.strip() for cell in row] for row in rows])
    return found


def results(name: str) -> dict:
    return json.loads((RESULTS / f"{name}.json").read_text())


def shown(text: str, value: float) -> bool:
    """text holds one number, and that is value in as many digits as it is written with."""
    number, = re.findall(r"\d+(?:\.\d+)?", text.replace(",", ""))
    return abs(float(number) - value) <= 0.51 * 10 ** -len(number.partition(".")[2])


def check_table(rows: list[list[str]], right: list[list[str]]) -> None:
    """The first cells of each row are the right ones; a failure prints the rows to paste."""
    same = len(rows) == len(right) and all(row[:len(r)] == r for row, r in zip(rows, right))
    assert same, "the right rows:\n" + "\n".join(f"| {' | '.join(cells)} |" for cells in right)


def test_a_cell_is_held_to_the_digits_it_shows():
    assert shown("18.25 dB", 18.2491) and shown("1,234", 1234.4) and shown("96%", 95.6)
    assert not shown("18.25", 18.26) and not shown("18", 18.6)


def test_result_files_say_where_they_come_from():
    for path in RESULTS.rglob("*.json"):
        made = json.loads(path.read_text())
        for row in made["rows"] if path.stem == "trials" else [made]:
            assert re.match(r"(OMP_NUM_THREADS=\d )?(python|make) ", row["command"]), path
            assert row["torch"] and row["device"], path
            assert re.fullmatch(r"[0-9a-f]{40}", row["commit"]), f"{path} is kept of a commit"
            assert "seed" in row or path.stem in ("pca", "bench-cpu"), f"{path}: not random?"


# ------------------------------------------------------------------------------------------------
# what is counted here

def sizes(name: str) -> tuple[list[str], str]:
    """A preset's parameters in millions: tokenizer, MIT, experts, decoder, AR model."""
    tok, gen, *_ = config.load_preset(name)
    classes = 1000 if "imagenet" in name else 10
    with torch.device("meta"):  # counted without making them
        model = NativeTok(tok).grow_to(tok.num_tokens)
        ar = ARGenerator(gen, tok.num_tokens, tok.codebook_size, classes)
    counts = map(count_parameters, (model, model.mit, model.mocet, model.decoder, ar))
    *parts, generator = [f"{n / 1e6:.0f}" if n >= 2e7 else f"{n / 1e6:.1f}" for n in counts]
    return parts, generator


def test_the_table_of_presets_is_what_the_models_count():
    lines = []
    for name in config.PRESETS:
        tok, (whole, *parts), generator = config.load_preset(name)[0], *sizes(name)
        tokens = f"{', '.join(map(str, tok.token_schedule))} × {tok.codebook_size}"
        images = f"{tok.image_size}×{tok.image_size}"
        lines.append([f"`{name}`", images, tokens, f"{whole} ({', '.join(parts)})", generator])
    check_table(tables(section("Presets"))[0], lines)


def gflop(step) -> float:
    """Operations of forward and backward, counted on the meta device, which computes nothing."""
    # autocast knows no such device
    autocast = mock.patch("torch.autocast", lambda *_, **__: contextlib.nullcontext())
    with autocast, FlopCounterMode(display=False) as counter:
        step().backward()
    return counter.get_total_flops() / 1e9


def imagenet_costs() -> dict[str, tuple[int, float, int, int]]:
    """{phase of imagenet-128: tokens, GFLOP an image, steps, images a step, GB of gradients}"""
    tok, gen, _, settings = config.load_preset("imagenet-128")
    images = torch.zeros(1, 3, tok.image_size, tok.image_size, device="meta")
    with torch.device("meta"):  # with the gradient that the timed steps had
        model = NativeTok(replace(tok, teacher_forcing=False)).eval()

    def step():
        recon, _, losses = model(images)
        return recon.square().mean() + sum(losses.values())

    found = {}
    for phase in train.phases(tok, settings):
        if model.num_tokens < phase.num_tokens:
            model.grow(phase.num_tokens)
        train.freeze(model, phase.learns)
        found[phase.name] = (phase.num_tokens, gflop(step), phase.steps, settings.batch_size,
                             4e-9 * count_parameters(model, learning_only=True))
    with torch.device("meta"):
        ar = ARGenerator(gen, tok.num_tokens, tok.codebook_size, 1000)
        ids = torch.zeros(1, tok.num_tokens, dtype=torch.int64)
    cost = gflop(lambda: ar.loss(ids, ids[:, 0])[0])
    found["ar"] = (tok.num_tokens, cost, settings.generator_steps, settings.generator_batch_size,
                   4e-9 * count_parameters(ar))
    return found


@pytest.mark.faults  # half a minute: each of 128 experts is called and counted
def test_costs_of_imagenet_are_what_the_operations_add_up_to():
    """Eight GPUs: a recorded step of an eighth of the images, as measured on one, and a ring's 7/4
    of the gradients at 300 GB/s."""
    rows = tables(section("Several GPUs, several machines", IMAGENET))[0]
    found = imagenet_costs()
    measured = {row["phase"]: row["ms"] for row in results("gpu")["rows"] if row["way"] == "graph"}
    assert [row[0] for row in rows] == list(found)
    for row, (tokens, cost, steps, batch, gb) in zip(rows, found.values()):
        exchange = gb * 7 / 4 / 300 * 1e3
        ms = measured[row[0]] + exchange
        values = [tokens, cost, steps, batch, measured[row[0]], gb, exchange, steps * ms / 3.6e6,
                  batch / ms * 1e3]
        assert all(map(shown, row[1:], values)), f"{row[0]}: {values}"


# ------------------------------------------------------------------------------------------------
# what result files hold

def test_tables_of_the_demo_are_those_of_its_result_file():
    made, (learned, sampled) = results("demo"), tables(section("The demo"))
    phases = {phase["phase"]: phase for phase in made["phases"]}
    right = [[name, str(phase["num_tokens"]), f"{phase['psnr']:.2f} dB",
              f"{phase['codebook_used']:.0%}", f"{phase['seconds']:.0f}"]
             for name, phase in phases.items() if "psnr" in phase]
    check_table(learned, right)
    judged = {row["name"]: row for row in made["evaluation"]["rows"]}
    right = [[name, f"{judged[key]['class_accuracy']:.1%} of {judged[key]['n']}",
              f"{phases[key]['seconds']:.0f}"]
             for key, name in (("ar", "AR"), ("maskgit", "MaskGIT, 8 steps"))]
    check_table(sampled, right)


def test_the_table_of_cifar_is_that_of_its_result_file():
    made = results("cifar")
    bits, right = (made["settings"]["codebook_size"] - 1).bit_length(), []
    for phase in made["phases"]:
        if "psnr" in phase:
            tokens = phase["num_tokens"]
            right.append([phase["phase"], f"{phase['steps']:,}", str(tokens), str(tokens * bits),
                          f"{phase['psnr']:.2f} dB", f"{phase['codebook_used']:.0%}"])
    on_a_gpu, on_a_cpu = tables(section("CIFAR-10"))
    check_table(on_a_cpu, right)
    right = []
    for title, name in (("`cifar`, codes read by attention alone", "cifar-gpu"),
                        ("wider and deeper, jointly", "cifar-gpu-wide")):
        made = results(name)
        learned = [phase for phase in made["phases"] if "psnr" in phase]
        right.append([title, f"{sum(phase['steps'] for phase in learned):,}",
                      str(made["settings"]["batch_size"]), f"{learned[-1]['psnr']:.2f} dB",
                      f"{sum(phase['seconds'] for phase in learned):.0f}"])
    check_table(on_a_gpu, right)


def test_the_gains_of_a_search_are_those_of_their_result_files():
    made, text = results("cifar-joint"), section("Searching for better tokens")
    learned, = made["phases"]
    assert made["command"] in text.replace("\\\n        ", "")
    assert f"{learned['seconds'] / 60:.1f} minutes" in text
    assert f"{learned['psnr']:.2f} dB" in section("CIFAR-10")
    for name in ("search-short", "search-titok"):
        assert search.table(results(name)["rows"]) in text
    found = results("search")
    assert found["command"] in text and search.table(found["rows"]) in text
    recon, = (row for row in made["evaluation"]["rows"] if row["name"] == "reconstruction")
    assert recon["n"] == found["images"] and shown(f"{found['rows'][0]['psnr']}", recon["psnr"])


def fd_of(row: dict) -> float:
    return row[order_table.fd_key(row)]


def test_what_the_flow_decoder_gains_is_what_its_result_files_say():
    grown, joint, whole = (results(f"flow-cifar-{name}") for name in ("hnt", "joint", "joint-full"))
    text = section("Sharp pictures")
    for made in (grown, joint, whole):
        assert flow.table(made["rows"]) in text, flow.table(made["rows"])
        assert f"{made['judge_accuracy']:.2%} of the test images" in text
    rebuilt = [row for row in grown["rows"] if row.get("num_tokens") == 16]
    mean, drawn = (min((row for row in rebuilt if row["decoder"] == decoder), key=fd_of)
                   for decoder in ("mean", "flow"))
    assert drawn["recall"] >= mean["recall"] + 0.04 and fd_of(drawn) <= fd_of(mean) / 3
    random = next(key for key in mean if key.startswith("fd_random"))
    assert drawn[random] <= mean[random] / 5
    of_ar = {decoder: min((row for row in grown["rows"] if row["name"] == "ar" and
                           row["decoder"] == decoder), key=fd_of) for decoder in ("mean", "flow")}
    assert fd_of(of_ar["flow"]) < fd_of(of_ar["mean"])
    assert of_ar["flow"][random] < of_ar["mean"][random]


def test_the_judge_of_photographs_is_right_as_often_as_its_page_says():
    made, text = results("judge"), section("How good is it?").replace("\n", " ")
    assert made["judge_accuracy"] >= 0.85 and made["held_out"] == 10000
    assert f"right on {made['judge_accuracy']:.2%} of the 10,000 test images" in text
    assert f"after {made['minutes']} minutes of two cores" in text and made["command"] in text


def test_the_table_of_controls_is_that_of_its_result_file():
    made, text = results("demo-controls"), section("How good is it?")
    head = [cell.strip() for cell in re.search(r"^\|.*$", text, flags=re.M)[0].split("|")]
    nets = [f"fd_tinycnn_{head[3].split()[-1]}", f"fd_random_{head[4].split()[-1]}"]
    rows = tables(text)[0]
    assert len(made["rows"]) == len(rows)
    for cells, found in zip(rows, made["rows"]):
        assert cells[0].lower().startswith(found["name"]) and shown(cells[1], found["n"]), cells
        values = [*map(found.get, nets), found["precision"], found["recall"]]
        assert all(map(shown, cells[2:], [*values, 100 * found["class_accuracy"]])), (cells, values)


def order_results(name: str) -> dict[str, list[dict]]:
    return order_table.read_results(str(RESULTS / name), (*order.ARMS, *order.GONE))


def test_tables_of_order_are_what_order_table_makes_of_the_results():
    """Those of prices on the page; all of them in their folders."""
    page = section("Does native order help?")
    for name in ("order-cifar", "order-cifar-cpu", "order-cifar-price", "order-cifar-entropy",
                 "order-cifar-forced", "order-cifar-swaps"):
        points = order_table.pca_points(str(RESULTS / name))
        for table in order_table.summary(order_results(name), points).values():
            right = "\n".join(table) + "\n"
            assert right in (RESULTS / name / "table.md").read_text()
            assert right in page or name != "order-cifar-price", f"the right table:\n{right}"


def test_what_the_page_says_of_prices_is_what_the_results_hold():
    """Means over the seeds of the decibels above PCA and of the distances, a number per length."""
    found, page = order_results("order-cifar-price"), section("Does native order help?")
    points = order_table.pca_points(str(RESULTS / "order-cifar-price"))
    above, distances = {}, {}
    for name, of_arm in found.items():
        assert [result["seed"] for result in of_arm] == [0, 1, 2], name
        rows = [order_table.columns(result, points) for result in of_arm]
        arm = name.split(",")[0].removeprefix("nativetok-")
        for means, column, digits in ((above, "above PCA, dB", 2), (distances, "AR: FD", 0)):
            mean = statistics.mean(row[column] for row in rows)
            means.setdefault(arm, []).append(f"{mean:.{digits}f}")
    page = page.replace("\n ", "")
    for arm, words in (("joint", "joint lies {} dB above a PCA code"), ("titok", "titok {}, HNT"),
                       ("hnt", "HNT {}.")):
        assert words.format(", ".join(above[arm])) in page
    assert "FD {} against {} of joint and {} of HNT".format(
        *(", ".join(distances[arm]) for arm in ("titok", "joint", "hnt"))) in page
    drawn = {}
    for arm in ("titok", "joint"):
        for row in results(f"drawn-{arm}")["rows"][1:]:
            drawn.setdefault(row["name"], {}).setdefault(arm, []).append(fd_of(row))
    assert "FD {:.1f} of titok and {:.1f} of joint".format(
        *(value for value, in drawn["reconstruction"].values())) in page
    assert "are at {:.1f} and {:.1f}.".format(*map(min, drawn["ar"].values())) in page


def lever_lines() -> list[str]:
    """The table of what makes tokens cheaper, a line for each of its ways."""
    as_it_is, unweighted = order_results("order-cifar-price"), order_results("order-cifar-entropy")
    points = order_table.pca_points(str(RESULTS / "order-cifar-price"))
    rates = {(arm, seed): results(f"rate-{arm}-{seed}")["rows"]
             for arm, seed in (("joint", 1), ("joint", 2), ("titok", 1))}
    third = results("rate-joint-0")["rows"]
    found = {}

    def add(name: str, pairs: list[tuple[float, float]]) -> None:
        rows = [{"psnr": psnr, "ar_bits_total": bits} for psnr, bits in pairs]
        found[name] = [[row["psnr"] for row in rows], [row["ar_bits_total"] for row in rows],
                       [order_table.above_pca(row, points) for row in rows]]

    for arm, of_arm in (("joint", as_it_is["nativetok-joint, 16 tokens"]),
                        ("HNT", as_it_is["nativetok-hnt, 16 tokens"]),
                        ("titok", as_it_is["titok, 16 tokens"])):
        add(f"{arm}, as above", [(made["psnr"], made["ar_bits_total"]) for made in of_arm])
    for name, arm in (("joint", "nativetok-joint"), ("HNT", "nativetok-hnt"), ("titok", "titok")):
        for part, weight in (("half of the", 50), ("a quarter of the", 25), ("no", 0)):
            of_arm = unweighted.get(f"{arm}-entropy{weight}, 16 tokens")
            if of_arm:
                add(f"{name}, {part} entropy term",
                    [(made["psnr"], made["ar_bits_total"]) for made in of_arm])
    swapped = order_results("order-cifar-swaps")["nativetok-joint-swaps, 16 tokens"]
    add("joint, near codes swapped in training",
        [(made["psnr"], made["ar_bits_total"]) for made in swapped])
    for arm in ("joint", "titok"):
        for price in (1e9, 53, 27, 13):
            rows = [row for (of, _), made in rates.items() if of == arm for row in made
                    if row["bits_a_db"] == price]
            way = f", at {price} bits a dB" if price < 1e9 else ""
            if rows:
                add(f"{arm}, 400 steps more{way}", [(row["psnr"], row["bits"]) for row in rows])
    for row in third:
        way = ", at 27 bits a dB" if row["bits_a_db"] < 1e9 else ""
        add(f"joint, half of the entropy term, 400 steps more{way}", [(row["psnr"], row["bits"])])
    for arm in ("joint", "titok"):
        (_, row) = results(f"search-price-{arm}")["rows"]
        add(f"{arm}, its encoder searches at 53 bits a dB", [(row["psnr"], row["bits_after"])])
    return [f"| {name} | {len(psnr)} | {order_table.cell(psnr, '.2f')} | "
            f"{order_table.cell(bits, '.1f')} | {order_table.cell(above, '+.2f')} |"
            for name, (psnr, bits, above) in found.items()]


def test_what_makes_tokens_cheaper_is_what_the_files_say():
    page = section("Does native order help?")
    lines = lever_lines()
    assert "\n".join(lines) + "\n" in page, "the right table:\n" + "\n".join(lines)


def test_longer_generators_are_what_the_files_say():
    page, words = " ".join(section("Does native order help?").split()), []
    for arm in ("titok", "joint"):
        names = [f"drawn-{arm}" + (f"-{steps}" if steps != 800 else "")
                 for steps in (500, 800, 2000, 6000)]
        best = [best_samples(name, decoder="flow") for name in names]
        words.append(", ".join(f"{fd_of(row):.1f}" for row in best))
        assert [row["cfg_scale"] for row in best][2:] == [7, 7]
    assert f"titok's FD is {words[0]} and joint's {words[1]}, each" in page, words


def test_the_longer_runs_are_what_the_files_say():
    page, arms = " ".join(section("Does native order help?").split()), order_results("order-cifar")
    points = order_table.pca_points(str(RESULTS / "order-cifar"))
    names = ("nativetok-joint", "nativetok-hnt", "titok-causal", "titok")
    above, bits = ([statistics.mean(of(made) for made in arms[name]) for name in names] for of in (
        lambda made: order_table.above_pca(made, points), lambda made: made["ar_bits_total"]))
    assert ("joint lies {:.2f} dB above a PCA code, HNT {:.2f}, titok-causal {:.2f}, titok {:.2f}, "
            "at {:.1f}, {:.1f}, {:.1f} and {:.1f} bits").format(*above, *bits) in page, above


def test_what_teacher_forcing_costs_is_what_the_files_say():
    with_it, without = order_results("order-cifar-forced"), order_results("order-cifar-price")
    cost = {}
    for arm in ("joint", "hnt"):
        cut, whole = (
            sum(made["psnr"] for made in of[f"nativetok-{arm}{name}, 16 tokens"]) / 3
            for of, name in ((with_it, "-cut"), (without, "")))
        cost[arm] = whole - cut
    assert -0.05 < cost["joint"] < 0, "nothing"
    assert f"costs grown tokenizers {cost['hnt']:.2f} dB and others nothing" in section("Speed")


def best_samples(name: str, **has) -> dict:
    """Of the samples of AR in a result file that `has` describes, those at the best guidance."""
    return min((row for row in results(name)["rows"] if row["name"] == "ar"
                and all(row.get(key) == value for key, value in has.items())), key=fd_of)


def test_samples_at_a_price_and_the_best_of_four_are_what_the_files_say():
    page = " ".join(section("Does native order help?").split())
    pairs = [[fd_of(best_samples(f"rate-samples/{arm}-{way}")) for way in ("control", "27")]
             for arm in ("joint-1", "joint-2", "titok-1")]
    words = ["from {:.1f} to {:.1f}".format(*pair) for pair in pairs]
    assert f"{words[0]} and {words[1]} with joint, and {words[2]} with titok" in page, words
    swapped, seeds = order_results("order-cifar-swaps")["nativetok-joint-swaps, 16 tokens"], {
        made["seed"]: made for made in order_results("order-cifar-price")[
            "nativetok-joint, 16 tokens"]}
    pairs = [[fd_of(made["samples"][0]) for made in (seeds[one["seed"]], one)] for one in swapped]
    words = " and ".join("from {:.1f} to {:.1f}".format(*pair) for pair in pairs)
    assert f"AR's samples (means) go {words}" in page, words
    plain, four = (best_samples("best-of", best_of=n, choose=how)
                   for n, how in ((None, None), (4, "chooser")))
    for words in (f"FD falls from {fd_of(plain):.1f} to {fd_of(four):.1f}",
                  f"in {four['class_accuracy']:.0%} instead of {plain['class_accuracy']:.0%}"):
        assert words in page, words


def test_what_weak_predictors_say_of_direction_is_what_the_results_hold():
    """Bits of one layer of AR, backwards less forwards, of runs whose tokens answer and of others.
    """
    answering, others = [], []
    for name in ("order-cifar", "order-cifar-cpu"):
        for made in itertools.chain.from_iterable(order_results(name).values()):
            bits = {way: made["predictors"][way]["one layer"] for way in ("native", "reversed")}
            answers = made["intervention"][0]["repaired"] > 0
            (answering if answers else others).append(bits["reversed"] - bits["native"])
    assert (f"pays {min(answering):.1f} to {max(answering):.1f} bits" in
            section("Does native order help?").replace("\n", " "))
    assert (len(answering), len(others)) == (18, 14) and min(others) < 0 < max(others)


def test_pages_say_of_intervention_what_its_result_file_says():
    made = results("cifar")["intervention"]
    first = made["rows"][0]
    exact = [f"{made['images']} images", f"{first['original']:.2f}", f"{first['broken']:.2f} dB",
             f"{first['answered']:.2f} dB", f"{first['later_ids_changed']:.0%} of their tokens"]
    assert [words for words in exact if words not in section("CIFAR-10")] == []
    rough = (f"PSNR falls from {first['original']:.1f} to {first['broken']:.1f} dB, and the later "
             f"experts bring it back to {first['answered']:.1f} dB")
    assert rough in README.replace("\n", " ")


def test_the_newest_speed_record_is_that_of_its_result_file():
    made = results("speedrun")
    _, commit, _, steps, threads, psnr, minutes = tables(RECORDS)[0][0]
    assert made["passed"] and made["commit"].startswith(commit)
    assert (steps, threads) == (f"{made['steps']:,}", str(made["threads"]))
    assert shown(psnr, made["psnr"]) and shown(minutes, made["minutes"])


def test_the_table_of_exercises_is_that_of_its_result_file():
    page = (ROOT / "EXERCISES.md").read_text(encoding="utf-8")
    rows, found = tables(page)[0], results("exercises")["rows"]
    assert [row[0] for row in rows] == [made["try"] for made in found]
    for cells, made in zip(rows, found):
        grown = made["perplexity_of_new_after_growth"]
        values = [*made["psnr_by_tokens"].values(), made["perplexity"], made["ar_nats_a_token"]]
        assert all(map(shown, cells[1:6] + cells[7:], values)), (cells, values)
        assert cells[6] == "-" if grown is None else shown(cells[6], grown), cells


def test_the_table_of_speed_is_what_bench_makes_of_its_rows():
    rows = results("bench-cpu")["rows"]
    times, share = ([row["value"] for row in rows if row["name"].startswith(name)]
                    for name in ("query against block", "whole encoder against"))
    text = section("Speed").replace("\n", " ")
    assert f"is {min(times):.0f} to {max(times):.0f} times as fast" in text
    assert f"takes {min(share):.0%} to {max(share):.0%} of TiTok-B's time" in text
    right = bench.table(rows)
    assert right in section("The bench", SPEED) + "\n", f"the right table:\n{right}"


def test_the_table_of_operations_and_processes_is_what_bench_makes_of_its_rows():
    right = bench.table(results("bench-steps")["rows"])
    assert right in section("Operations of a step, and two processes", SPEED), right


# ------------------------------------------------------------------------------------------------
# the front page

def minutes(made: dict) -> float:
    return sum(phase["seconds"] for phase in made["phases"]) / 60


def judged(made: dict, name: str) -> dict:
    row, = (row for row in made["evaluation"]["rows"] if row["name"] == name)
    return row


def test_the_table_of_results_on_the_front_page_is_that_of_the_result_files():
    """What was measured and what came out, of each row."""
    demo, grown, joint, found, d2it, all_fine = map(results, (
        "demo", "cifar", "cifar-joint", "search", "demo-d2it", "demo-d2it-fine"))
    ar, maskgit = (judged(demo, name)["class_accuracy"] for name in ("ar", "maskgit"))
    arms = {arm: [statistics.mean(row[what] for row in order_results("order-cifar")[arm])
                  for what in ("psnr", "ar_bits_total")] for arm in ("nativetok-joint", "titok")}
    (psnr, bits), (psnr_of_unordered, bits_of_unordered) = arms.values()
    codes = grain_table.rows_of(order_table.read_results(
        str(RESULTS / "grain-cifar-cpu"), (*grain.ARMS, *grain.GONE)))["Codes"]
    by_detail, at_random = (statistics.mean(row["PSNR, dB"] for row in codes[name])
                            for name in ("entropy", "random"))
    last = {made["command"]: [phase for phase in made["phases"] if "psnr" in phase][-1]["psnr"]
            for made in (demo, grown, joint, d2it)}
    demo_psnr, grown_psnr, joint_psnr, d2it_psnr = last.values()
    share = judged(d2it, "samples.npz")["class_accuracy"]
    mean, drawn = (row for row in results("flow-cifar-hnt")["rows"][1:3])
    check_table(tables(section("Results", README))[0], [
        ["the demo reconstructs shapes", f"{demo_psnr:.2f} dB from 16 tokens of 8 bits"],
        ["the demo's new images",
         f"{ar:.1%} (AR) and {maskgit:.1%} (MaskGIT) of 500 show their class"],
        [f"CIFAR-10, grown by HNT, {minutes(grown):.0f} minutes of one thread with its generator",
         f"{grown_psnr:.2f} dB from 16 tokens of 9 bits"],
        [f"CIFAR-10, all 16 experts from the start, {minutes(joint):.0f} minutes of two cores",
         f"{joint_psnr:.2f} dB"],
        ["the same tokenizer, its encoder searches for better tokens",
         f"{found['rows'][0]['psnr']:.2f} becomes {found['rows'][-1]['psnr']:.2f} dB"],
        ["CIFAR-10, drawn instead of the mean, by a flow decoder after 37 minutes of one thread",
         f"Fréchet distance of reconstructions {fd_of(drawn):.1f} instead of {fd_of(mean):.1f}, at "
         f"{drawn['psnr']:.2f} instead of {mean['psnr']:.2f} dB"],
        ["CIFAR-10, ordered tokens against unordered ones of a network as large",
         f"{psnr:.2f} against {psnr_of_unordered:.2f} dB, at {bits:.1f} against "
         f"{bits_of_unordered:.1f} bits"],
        [f"the demo of D²iT, {minutes(d2it) + minutes(all_fine):.1f} minutes of one thread",
         f"{d2it_psnr:.2f} dB with {d2it['phases'][0]['codes']:.1f} codes of at most 64; "
         f"{share:.1%} of 500 samples show their class"],
        ["D²iT on CIFAR-10, codes placed by detail against at random",
         f"{by_detail:.2f} against {at_random:.2f} dB"]])
    pca = dict(results("order-cifar/pca")["bits_and_psnr"])
    assert f"as many bits reaches {pca[16 * 9]:.2f} dB on CIFAR-10" in README.replace("\n", " ")


def test_the_front_page_says_of_the_demo_and_of_gpus_what_their_files_say():
    demo, photos, gpu, text = results("demo"), results("photos"), results("gpu"), README
    steps = {(row["phase"], row["way"]): row for row in gpu["rows"]}
    eager, recorded = (steps["finetune", way] for way in ("eager", "graph"))
    psnr = demo["evaluation"]["psnr_by_tokens"]
    tokenizer = [phase for phase in results("cifar-gpu")["phases"] if "psnr" in phase]
    right = [
        f"{60 * minutes(demo):.0f} seconds of them for training",
        f"a PSNR of {psnr['4']:.2f} dB from 4 numbers, {psnr['8']:.2f} dB from 8 and "
        f"{psnr['16']:.2f} dB from 16",
        f"Of {judged(demo, 'ar')['n']} new images",
        f"{judged(demo, 'ar')['class_accuracy']:.1%} with one generator (AR) and in "
        f"{judged(demo, 'maskgit')['class_accuracy']:.1%} with another (MaskGIT)",
        f"took {minutes(photos):.1f} minutes of one thread",
        f"reached {photos['phases'][3]['psnr']:.2f} dB",
        f"[{eager['ms'] / recorded['ms']:.1f} times as fast]", f"takes {recorded['gib']:.1f} GiB",
        f"trains in {sum(phase['seconds'] for phase in tokenizer):.0f} seconds on an H100"]
    assert [words for words in right if words not in text.replace("\n", " ")] == []


# What made the next ones is gone (experiments/README.md says where it is); their numbers stay.

def test_the_table_of_trials_holds_the_rows_of_its_file():
    page = section("What one change does")
    for row in results("trials")["rows"]:
        assert (f"| {row['trial']} | 1 | {row['psnr']:.2f} dB | {row['perplexity']:.0f} | "
                f"{row['ar_bits']:.1f} | {row['entropy_bits']:.1f} | "
                f"{row['tokenizer_seconds']:.0f} |") in page


def test_the_table_of_gpu_steps_is_that_of_its_result_file():
    made, right = results("gpu"), []
    rows = {(row["phase"], row["way"]): row for row in made["rows"]}
    for (name, way), eager in rows.items():
        if way == "eager":
            best = rows.get((name, "graph"), eager)
            ms = ["-", "-"] if best is eager else [f"{best['ms']:.1f}",
                                                   f"{eager['ms'] / best['ms']:.1f}×"]
            share = eager["gflop"] / best["ms"] / made["tflops"]
            right.append([name, f"{eager['ms']:.1f}", *ms, f"{best['per_second']:,.0f}",
                          f"{share:.1%}", f"{best['gib']:.1f}"])
    check_table(tables(section("Speed"))[0], right)


def test_the_table_of_a_sampling_step_is_that_of_its_result_file():
    made = results("sampler")
    before, now = made["before"]["cases"], made["now"]["cases"]
    right = [["whole", *(f"{before[case]['whole']:.1f} → {now[case]['whole']:.1f}"
                         for case in now)]]
    for kind in next(iter(now.values()))["ms"]:
        cells = []
        for case in now:
            calls = [f" ({one[case]['calls'][kind]:.0f})" if kind in one[case]["calls"] else ""
                     for one in (before, now)]
            cells.append(" → ".join(f"{one[case]['ms'][kind]:.1f}{call}"
                                    for one, call in zip((before, now), calls)))
        right.append([kind, *cells])
    check_table(tables(section("A sampling step", SPEED))[0], right)


def test_the_table_of_growing_sizes_is_that_of_its_result_file():
    made, right = results("scaling"), []
    shown_rows, = tables(section("How time and memory grow", SPEED))
    for what in ("tokens", "patches", "width"):
        values = made[what]["points"]
        for work in ("encoding", "training step"):
            cells = []
            for unit in ("ms_an_image", "mib"):
                numbers, grows = made[what][work][unit], made[what][work]["exponents"][unit]
                cells += [f"{numbers[0]:,.0f} to {numbers[-1]:,.0f}",
                          f"{grows['fit']:.2f} ({grows['end']:.2f})"]
            right.append([f"{what}, {values[0]} to {values[-1]}", work, *cells])
    check_table([[row[0].split(" (")[0], *row[1:]] for row in shown_rows], right)
