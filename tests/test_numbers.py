"""Every number in the pages is counted here anew, or is in a result file that says with which command, commit, seed and device it was made."""
import ast
import contextlib
import json
import re
from pathlib import Path
from statistics import mean, stdev
from unittest import mock

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import config
import train
from experiments import order, order_table, trials
from generator import ARGenerator
from layers import count_parameters
from nativetok import NativeTok

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "experiments" / "results"
PAGES = {name: (ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "experiments/README.md", "CONTRIBUTING.md", "tests/README.md")}


def sections(page: str) -> dict[str, str]:
    parts = re.split(r"^## (.*)$", PAGES[page], flags=re.M)
    return {"": parts[0], **dict(zip(parts[1::2], parts[2::2]))}


def table(text: str) -> list[list[str]]:
    """The first table in a text, without its head: rows of cells."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def results(name: str) -> dict:
    return json.loads((RESULTS / f"{name}.json").read_text())


def shown(text: str, value: float) -> bool:
    """text is value, in as many digits as it is written with."""
    number, = re.findall(r"\d+(?:\.\d+)?", text.replace(",", ""))
    return abs(float(number) - value) <= 0.51 * 10 ** -len(number.partition(".")[2])


# ------------------------------------------------------------------------------------------------
# measured numbers, wherever they stand

# page, section: result files; numbers that are settings, versions or other people's, and nothing that was measured here
HELD = {
    ("README.md", ""): ("demo", "~6"),
    ("README.md", "Your own pictures"): ("photos", ""),
    ("README.md", "ImageNet, several GPUs, several machines"): ("", "30 300 296 222 261 354 69 4.0 0.9 4.6 1.0"),   # test_costs_of_imagenet...
    ("README.md", "What the paper says, what we chose"): ("", "5.23 2.16"),  # the paper's
    ("README.md", "Presets"): ("demo", "6.7 1.0 4.8 0.9 1.9 5.1 3.2 4.3"),  # test_parameters_in...
    ("README.md", "What has been run"): ("demo cifar order-cifar-cpu", ""),
    ("README.md", "Does native order help?"): ("order-tiny order-cifar-cpu", "1.5 10"),
    ("README.md", "Questions"): ("demo", "0.1 5.5 6.2"),  # ln 256, ln 512
    ("README.md", "What is not there yet"): ("", "2.13 3.11 2.5 3.10"),
    ("experiments/README.md", "Evaluation: how good is it?"): ("demo demo-controls", ""),
    ("experiments/README.md", "A publishable ImageNet FID"): ("", "50000"),
    ("experiments/README.md", "What one change does"): ("trials", "0.2"),
    # targets: test_targets_in...
    ("experiments/README.md", "Speed"): ("bench-cpu", "1.05 0.9 0.6 1.1 0.95 0.3 1.0 2 10 2.13"),
}
UNITS = r"(?:dB|%|s|ms|seconds|minutes|min|hours|h|GB|GiB|MiB|MB|nats|GFLOP|GFLOP/s|GB/s)"


FACTORS = {"%": (100, 1), "ms": (1, 1000), "minutes": (1, 1 / 60), "min": (1, 1 / 60), "GB": (1, 1 / 1024), "GiB": (1, 1 / 1024)}   # as files have it -> as pages tell it


def measured(text: str) -> list[tuple[str, str]]:
    """Numbers that look measured, with their unit: decimals, and whole ones with a unit. Code, commands, links and pictures are left out."""
    text = re.sub(r"```.*?```|`[^`\n]*`|\]\([^)]*\)|^    .*$", " ", text, flags=re.M | re.S)
    text = re.sub(r"\d+×\d+|\d+ × 10[⁰-⁹]+", " ", text)                      # sizes of images
    found = re.findall(rf"(?<![\w.,])(?:(\d[\d,]*\.\d+)(?![\d.]*\d)(?: ?({UNITS})(?![\w]))?|(\d[\d,]*) ?({UNITS})(?![\w]))", text)
    return [((decimal or whole).replace(",", ""), one or other) for decimal, one, whole, other in found]


def numbers(value) -> list[float]:
    """All numbers in a result file, those inside its texts too."""
    if isinstance(value, dict):
        return [n for part in value.values() for n in numbers(part)]
    if isinstance(value, list):
        return [n for part in value for n in numbers(part)]
    if isinstance(value, str):
        return [float(n) for n in re.findall(r"(?<![\w.])\d+(?:\.\d+)?(?![\w])", value)]
    return [float(value)] if isinstance(value, (int, float)) and not isinstance(value, bool) else []


def known(name: str) -> list[float]:
    """The numbers of a result file; of a folder of order.py those of all its files, with means and deviations over seeds."""
    if (RESULTS / f"{name}.json").exists():
        return numbers(results(name))
    found = [n for path in (RESULTS / name).glob("*.json") for n in numbers(json.loads(path.read_text()))]
    for of_arm in order_table.read_results(str(RESULTS / name), order.ARMS).values():
        tables = [order_table.columns(result) for result in of_arm]
        for title, row in tables[0].items():
            values = [[t[title][column] for t in tables] for column in row]
            found += [mean(some) for some in values] + [stdev(some) for some in values if len(some) > 1]
    return found


@pytest.mark.parametrize("page, section", [(page, section) for page in ("README.md", "experiments/README.md", "CONTRIBUTING.md") for section in sections(page)])
def test_measured_numbers_are_in_the_result_files(page, section):
    files, given = HELD.get((page, section), ("", ""))
    values = [n for name in files.split() for n in known(name)]
    for number, unit in measured(sections(page)[section]):
        told = number in given.replace("~", "").split() or any(shown(number, value * factor) for value in values for factor in FACTORS.get(unit, (1,)))
        assert told, f"{page}, {section!r}: {number} {unit} is in none of: {files or 'no file'}"


def test_a_number_that_nobody_measured_would_be_noticed():
    assert measured("It took 12 s, `--x 3.5`, on 32×32 pixels, and reached 18.25 dB, 1,234 ms\n    python x.py 4.5\nin 3 phases") == [("12", "s"), ("18.25", "dB"), ("1234", "ms")]
    assert shown("18.25", 18.2491) and not shown("18.25", 18.26)


def test_no_rule_is_left_over():
    assert all(section in sections(page) for page, section in HELD)


@pytest.mark.parametrize("path", sorted(RESULTS.rglob("*.json")), ids=lambda path: path.stem)
def test_result_files_say_where_they_come_from(path):
    made = json.loads(path.read_text())
    for row in made["rows"] if path.stem == "trials" else [made]:
        assert row["command"].split()[0] in ("python", "make", "OMP_NUM_THREADS=1") and row["torch"] and row["device"]
        # bench-cpu.json is older than bench.py's habit of writing its commit.
        assert path.stem == "bench-cpu" or re.fullmatch(r"[0-9a-f]{40}", row["commit"]), "a result is kept of a commit, not of files in the making"
        assert "seed" in row or path.stem in ("pca", "bench-cpu"), "nothing random in these"


# ------------------------------------------------------------------------------------------------
# tables, cell by cell

@pytest.mark.parametrize("row", table(sections("README.md")["Presets"]), ids=lambda row: row[0])
def test_parameters_in_the_table_of_presets_are_those_of_the_models(row):
    name, _, tokens, parameters, generator, _ = row
    tok, gen, _ = config.load_preset(name.strip("`"))
    assert tokens == f"{', '.join(map(str, tok.token_schedule))} × {tok.codebook_size}"
    with torch.device("meta"):  # counted without making them
        model = NativeTok(tok).grow_to(tok.num_tokens)
        counts = [count_parameters(part) for part in (model, model.mit, model.mocet, model.decoder)]
        made = count_parameters(ARGenerator(gen, tok.num_tokens, tok.codebook_size, 1000 if "imagenet" in name else 10))
    said = [float(number) for number in re.findall(r"[\d.]+", parameters)]
    for count, number, text in zip([*counts, made], [*said, float(generator.split()[0])], [*re.findall(r"[\d.]+", parameters), generator.split()[0]]):
        digits = len(text.partition(".")[2])
        assert abs(count / 1e6 - number) <= 0.51 * 10 ** -digits, f"{name}: {count / 1e6:.2f} M, the README says {text}"


def test_targets_in_the_table_of_speed_are_those_of_bench():
    source = (ROOT / "experiments/bench.py").read_text(encoding="utf-8")
    targets = {float(n) for n in re.findall(r"(?<![\w.])(\d+(?:\.\d+)?)(?![\w.])", " ".join(
        ast.get_source_segment(source, node) for node in ast.walk(ast.parse(source)) if isinstance(node, (ast.Constant, ast.Tuple, ast.List, ast.Dict))))}
    for row in table(sections("experiments/README.md")["Speed"]):
        for number in re.findall(r"[\d.]+", row[2]):
            value = float(number)
            assert value in targets or value / 100 in targets, f"{row[0]}: target {number}"


def test_values_in_the_table_of_speed_are_those_of_the_result_file():
    """Every number in the value column is one of bench.py's, rounded as it is written there."""
    measured = [row["value"] for row in results("bench-cpu")["rows"]]
    for row in table(sections("experiments/README.md")["Speed"]):
        for number in re.findall(r"\d+(?:\.\d+)?", row[1]):
            digits = len(number.partition(".")[2])
            assert any(abs(value - float(number)) <= 0.51 * 10 ** -digits for value in measured), f"{row[0]}: {number}"


def test_numbers_of_the_demo_are_those_of_its_result_file():
    made, text = results("demo"), sections("README.md")["What has been run"]
    by_phase = {phase["phase"]: phase for phase in made["phases"]}
    rows = table(text)
    assert [row[0] for row in rows[:4]] == ["base", "grow-20", "grow-24", "finetune"]
    for phase, tokens, psnr, used, seconds in rows[:4]:
        found = by_phase[phase]
        assert int(tokens) == found["num_tokens"] and shown(psnr, found["psnr"]) and shown(used, 100 * found["codebook_used"]) and shown(seconds, found["seconds"])
    for name, kind in (("AR", "ar"), ("MaskGIT, 8 steps", "maskgit")):
        accuracy, seconds = re.search(rf"^\| {name} \| ([\d.]+)% of 500 \| (\d+) \|$", text, flags=re.M).groups()
        assert shown(accuracy, 100 * made["class_accuracy"][kind]) and shown(seconds, by_phase[kind]["seconds"])


def test_numbers_of_the_controls_are_those_of_their_result_file():
    made, text = results("demo-controls"), sections("experiments/README.md")["Evaluation: how good is it?"]
    head = [cell.strip() for cell in re.search(r"^\|.*$", text, flags=re.M)[0].strip("|").split("|")]
    eyes, rows = [f"fd_tinycnn_{head[2].split()[-1]}", f"fd_random_{head[3].split()[-1]}"], table(text)
    assert len(made["rows"]) == len(rows) == 8
    for cells, found in zip(rows, made["rows"]):
        assert cells[0].lower().startswith(found["name"]) and int(cells[1].replace(",", "")) == found["n"], cells
        values = [found[eye] for eye in eyes] + [found["precision"], found["recall"], 100 * found["class_accuracy"]]
        assert all(map(shown, cells[2:], values)), (cells, values)


@pytest.mark.parametrize("name", ("order-tiny", "order-cifar-cpu"))
def test_tables_of_the_order_experiment_are_what_order_table_makes_of_the_results(name):
    found = order_table.read_results(str(RESULTS / name), order.ARMS)
    for line in order_table.summary(found):
        assert line in sections("README.md")["Does native order help?"].splitlines(), f"the README lacks: {line}"
    assert "\n".join(order_table.summary(found)) in (RESULTS / name / "table.md").read_text()


def test_the_table_of_trials_is_what_trials_makes_of_its_rows():
    assert trials.table(results("trials")["rows"]) in PAGES["experiments/README.md"]


# ------------------------------------------------------------------------------------------------
# what ImageNet should cost

def gflop_an_image(model: NativeTok) -> float:
    """Operations of forward and backward, counted without computing; autocast knows no such device."""
    images = torch.zeros(1, 3, 256, 256, device="meta")
    with mock.patch("torch.autocast", lambda *_, **__: contextlib.nullcontext()), FlopCounterMode(display=False) as counter:
        recon, _, losses = model(images)
        (recon.square().mean() + sum(losses.values())).backward()
    return counter.get_total_flops() / 1e9


def test_costs_of_imagenet_are_what_the_operations_add_up_to():
    """Operations of one image's training step in each phase, then steps x images, then 8 GPUs at 300 TFLOP/s."""
    tok, gen, settings = config.load_preset("imagenet-128")
    text, cost, total = sections("README.md")["ImageNet, several GPUs, several machines"], {}, 0.0
    with torch.device("meta"):
        model = NativeTok(tok).eval()
        for phase in train.phases(tok, settings):
            if model.num_tokens < phase.num_tokens:
                model.grow(phase.num_tokens)
            train.freeze(model, phase.learns)
            cost[phase.name] = gflop_an_image(model)
            total += cost[phase.name] * 1e9 * phase.steps * settings.batch_size
        ar = ARGenerator(gen, tok.num_tokens, tok.codebook_size, 1000)
        with FlopCounterMode(display=False) as counter:
            ar.loss(torch.zeros(1, tok.num_tokens, dtype=torch.int64), torch.zeros(1, dtype=torch.int64))[0].backward()
    ar_cost = counter.get_total_flops() / 1e9
    ar_total = ar_cost * 1e9 * settings.generator_steps * settings.generator_batch_size
    said = re.search(r"([\d]+) GFLOP in base .*?, (\d+) and (\d+) in the growth steps .*?, (\d+) in\s+the fine-tune, and (\d+) for", text, flags=re.S).groups()
    assert all(map(shown, said, [*cost.values(), ar_cost])), (said, cost, ar_cost)
    assert all(map(shown, re.findall(r"([\d.]+) × 10¹⁹", text), (total / 1e19, ar_total / 1e19))), (total, ar_total)
    hours = re.search(r"would need ([\d.]+) hours and ([\d.]+)", text).groups()
    assert all(map(shown, hours, (total / 8 / 300e12 / 3600, ar_total / 8 / 300e12 / 3600))), (total / 8 / 300e12 / 3600, ar_total / 8 / 300e12 / 3600)
    assert "8,100 of them a second" in text and round(8 * 300e12 / (cost["base"] * 1e9), -2) == 8100
