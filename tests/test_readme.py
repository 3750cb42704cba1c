"""README and CONTRIBUTING say what is true: links lead somewhere, quoted code is in its file, commands run, counted numbers count."""
import ast
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import config
from helpers import SMALL, some_shapes
from layers import count_parameters
from nativetok import NativeTok

ROOT = Path(__file__).parent.parent
PAGES = {name: (ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "CONTRIBUTING.md", "tests/README.md")}
README = PAGES["README.md"]


@pytest.mark.parametrize("name", PAGES)
def test_every_relative_link_leads_to_a_file(name):
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", PAGES[name]) if not link.startswith("http")]
    assert links or name == "tests/README.md"
    for link in links:
        assert ((ROOT / name).parent / link.split("#")[0]).exists(), link


@pytest.mark.parametrize("name", PAGES)
def test_every_file_that_is_named_exists(name):
    """`like_this.py` is a file of ours, in the root or beside the page; evaluator.py is ADM's, photo.jpg the reader's."""
    for file in re.findall(r"`([\w/.-]+\.(?:py|md|toml))`", PAGES[name]):
        assert (ROOT / file).exists() or (ROOT / name).parent.joinpath(file).exists(), file


def test_sections_that_the_code_refers_to_exist():
    headings = re.findall(r"^#+ (.*)$", README, flags=re.M)
    named = [(path.name, title) for path in ROOT.glob("*.py") for title in re.findall(r'README, "([^"]+)"', path.read_text(encoding="utf-8"))]
    assert named
    for file, title in named:
        assert any(title in heading for heading in headings), f"{file} sends its reader to README, {title!r}"


def test_the_lines_of_the_tour_are_in_their_files():
    tour = README.split("## Ten minutes with one image")[1].split("\n## ")[0]
    steps = re.findall(r"\[(\w+\.py)\].*?```python\n(.*?)```", tour, flags=re.S)
    assert len(steps) == 6
    for file, code in steps:
        source = [line.strip() for line in (ROOT / file).read_text(encoding="utf-8").splitlines()]
        for line in code.splitlines():
            assert line.strip() in source, f"{file} no longer holds: {line}"


def test_every_flag_that_is_named_exists():
    """`--flags` anywhere in the pages, against the source that reads them."""
    sources = " ".join(path.read_text(encoding="utf-8") for path in [*ROOT.glob("*.py"), *ROOT.glob("experiments/*.py")])
    torchrun = {"nproc_per_node", "nnodes", "node_rank", "rdzv_backend", "rdzv_endpoint", "rdzv_id", "max-restarts"}
    fields = {f for part in config.load_preset("tiny") for f in vars(part)}
    for page in PAGES.values():
        for flag in set(re.findall(r"--([a-z][\w-]+)", page)) - torchrun:
            assert flag in fields or flag.removeprefix("no-") in fields or f'"--{flag}"' in sources or f'flag("{flag}"' in sources, f"--{flag}"


# ------------------------------------------------------------------------------------------------
# numbers that can be counted

def table(title: str) -> list[list[str]]:
    """The first table under a heading, without its head: rows of cells."""
    lines = [line for line in re.split(rf"^#+ {title}.*$", README, flags=re.M)[1].split("\n## ")[0].splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


@pytest.mark.parametrize("row", table("Presets"), ids=lambda row: row[0])
def test_parameters_in_the_table_of_presets_are_those_of_the_models(row):
    from generator import ARGenerator
    name, _, tokens, parameters, generator, _ = row
    tok, gen, _ = config.load_preset(name.strip("`"))
    assert tokens == f"{', '.join(map(str, tok.token_schedule))} × {tok.codebook_size}"
    with torch.device("meta"):                                                # counted without making them
        model = NativeTok(tok).grow_to(tok.num_tokens)
        counts = [count_parameters(part) for part in (model, model.mit, model.mocet, model.decoder)]
        made = count_parameters(ARGenerator(gen, tok.num_tokens, tok.codebook_size, 1000 if "imagenet" in name else 10))
    said = [float(number) for number in re.findall(r"[\d.]+", parameters)]
    for count, number, text in zip([*counts, made], [*said, float(generator.split()[0])], [*re.findall(r"[\d.]+", parameters), generator.split()[0]]):
        digits = len(text.partition(".")[2])
        assert abs(count / 1e6 - number) <= 0.51 * 10 ** -digits, f"{name}: {count / 1e6:.2f} M, the README says {text}"


def test_bits_of_the_cifar_table_are_tokens_times_bits_of_a_code():
    tok = config.load_preset("cifar")[0]
    rows = table("cifar")
    assert [int(row[2]) for row in rows] == [*tok.token_schedule, tok.num_tokens]
    assert [int(row[3]) for row in rows] == [int(row[2]) * (tok.codebook_size.bit_length() - 1) for row in rows]


def test_steps_of_the_cifar_table_are_the_presets():
    train = config.load_preset("cifar")[2]
    assert [int(row[1].replace(",", "")) for row in table("cifar")] == [train.base_steps, train.grow_steps, train.grow_steps, train.finetune_steps]


def test_targets_in_the_table_of_speed_are_those_of_bench():
    source = (ROOT / "bench.py").read_text(encoding="utf-8")
    targets = {float(n) for n in re.findall(r"(?<![\w.])(\d+(?:\.\d+)?)(?![\w.])", " ".join(
        ast.get_source_segment(source, node) for node in ast.walk(ast.parse(source)) if isinstance(node, (ast.Constant, ast.Tuple, ast.List, ast.Dict))))}
    for row in table("Speed"):
        for number in re.findall(r"[\d.]+", row[2]):
            value = float(number)
            assert value in targets or value / 100 in targets, f"{row[0]}: target {number}"


def test_values_in_the_table_of_speed_are_those_of_the_result_file():
    """Every number in the value column is one of bench.py's, rounded as it is written there."""
    measured = [row["value"] for row in json.loads((ROOT / "experiments" / "results" / "bench-cpu.json").read_text())["rows"]]
    for row in table("Speed"):
        for number in re.findall(r"\d+(?:\.\d+)?", row[1]):
            digits = len(number.partition(".")[2])
            assert any(abs(value - float(number)) <= 0.51 * 10 ** -digits for value in measured), f"{row[0]}: {number}"


def results(name: str) -> dict:
    return json.loads((ROOT / "experiments" / "results" / f"{name}.json").read_text())


def shown(text: str, value: float) -> bool:
    """text is value, in as many digits as it is written with."""
    number, = re.findall(r"\d+(?:\.\d+)?", text.replace(",", ""))
    return abs(float(number) - value) <= 0.51 * 10 ** -len(number.partition(".")[2])


def test_numbers_of_the_demo_are_those_of_its_result_file():
    made, rows = results("demo"), table("tiny: the built-in shapes")
    by_phase = {phase["phase"]: phase for phase in made["phases"]}
    assert [row[0] for row in rows[:4]] == ["base", "grow-20", "grow-24", "finetune"]
    for phase, tokens, psnr, used, seconds in rows[:4]:
        found = by_phase[phase]
        assert int(tokens) == found["num_tokens"] and shown(psnr, found["psnr"]) and shown(used, 100 * found["codebook_used"]) and shown(seconds, found["seconds"])
    for name, kind in (("AR", "ar"), ("MaskGIT, 8 steps", "maskgit")):
        accuracy, seconds = re.search(rf"^\| {name} \| ([\d.]+)% of 500 \| (\d+) \|$", README, flags=re.M).groups()
        assert shown(accuracy, 100 * made["class_accuracy"][kind]) and shown(seconds, by_phase[kind]["seconds"])


def test_numbers_of_the_controls_are_those_of_their_result_file():
    made = results("demo-controls")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in README.split("`tiny` (the run of")[1].split("`cifar` (")[0].splitlines() if line.startswith("|")]
    eyes = [f"fd_tinycnn_{rows[0][2].split()[-1]}", f"fd_random_{rows[0][3].split()[-1]}"]
    assert len(rows) - 2 == len(made["rows"]) == 8
    for cells, found in zip(rows[2:], made["rows"]):
        assert cells[0].lower().startswith(found["name"]) and int(cells[1]) == found["n"], cells
        values = [found[eye] for eye in eyes] + [found["precision"], found["recall"], 100 * found["class_accuracy"]]
        assert all(map(shown, cells[2:], values)), (cells, values)


# ------------------------------------------------------------------------------------------------
# commands

ELSEWHERE = ("python evaluator.py",)                                          # other people's programs


def commands() -> list[str]:
    """Every command of the pages that starts a file of ours, once: of indented lines, code spans and fences; comments left out."""
    found = []
    for page in PAGES.values():
        lines = re.findall(r"^    (\S.*)$", page, flags=re.M) + re.findall(r"`((?:OMP|python|torchrun)[^`\n]*)`", page.replace("\n   ", " ")) + re.findall(r"^(python .*)$", page, flags=re.M)
        for line in lines:
            line = re.split(r"\s{2,}[#(]|\s#|\.\.\.", line.strip())[0].strip()
            if re.match(r"(OMP_NUM_THREADS=1 )?(python|torchrun) .*\.py", line) and not line.startswith(ELSEWHERE):
                found.append(line)
    return sorted(set(found))


def test_make_targets_exist():
    targets = set(re.findall(r"^(\w[\w-]*):", (ROOT / "Makefile").read_text(), flags=re.M))
    named = {name for page in PAGES.values() for name in re.findall(r"(?:^    |`)make ([\w-]+)", page, flags=re.M)}
    assert named and named <= targets


@pytest.fixture(scope="module")
def seen():
    """Commands that have run: two that differ only in what is replaced here need not both."""
    return set()


@pytest.fixture(scope="module")
def place(small_run, tmp_path_factory):
    """A folder in which the commands find what they name: images under every name used, and the small run."""
    folder = tmp_path_factory.mktemp("reader")
    some_shapes(folder / "shapes.npz", 60)
    Image.fromarray(np.full((40, 30, 3), 90, np.uint8)).save(folder / "photo.jpg")
    shutil.copytree(small_run, folder / "run")
    return folder


def arguments(line: str, place: Path) -> tuple[str, list[str]]:
    """A command of the pages -> its file and its flags, with data and run of `place`."""
    words = [word for word in shlex.split(line) if "=" not in word or word.startswith("--")]
    words = words[words.index("--") + 1:] if words[0] == "torchrun" else words[1:]
    file, flags = words[0], words[1:]
    for i, word in enumerate(flags):
        before = flags[i - 1] if i else ""
        if before in ("--data", "--val_data", "--images") and file != "train.py":
            flags[i] = str(place / "shapes.npz")
        elif before in ("--run", "--against"):
            flags[i] = str(place / "run")
        elif "--reconstruct" in flags[:i] and word.endswith(".jpg"):
            flags[i] = str(place / "photo.jpg")
        elif before == "--num_samples":
            flags[i] = "20"
        elif before == "--train_features":
            flags[i] = "5"
        elif before in ("--npz", "--out", "--json"):
            flags[i] = str(place / Path(word).name)
        elif "--prefixes" in flags[:i]:
            flags[i] = str(min(int(word), 6))                                 # the small run has six tokens
    return file, flags


@pytest.mark.parametrize("line", commands())
def test_commands_run(line, place, seen):
    """Training commands are parsed with their own settings; the others run on a small run. Long ones only parse."""
    file, flags = arguments(line, place)
    assert (ROOT / file).exists(), line
    if file == "train.py" and "--help" not in flags:
        if "--run" in flags:
            flags[flags.index("--run") + 1] = str(place / "new")
        assert config.parse_run("", flags).preset in config.PRESETS           # raises for a flag or value that is wrong
        return
    if file.startswith("experiments/") or file == "bench.py" or "inception" in flags or "VIRTUAL" in line:
        flags = ["--help"]                                                    # minutes or hours, or files of others
    elif file == "eval_fid.py":
        flags += ["5"] * (flags[-1] == "--train_features") + ["--num_samples", "20"]
    if (file, *flags) in seen:
        return
    seen.add((file, *flags))
    done = subprocess.run([sys.executable, str(ROOT / file), *flags], cwd=place, capture_output=True, text=True, timeout=300,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, f"{line}\n{done.stderr[-2000:]}"


def test_the_list_of_commands_is_not_empty():
    files = {arguments(line, Path("."))[0] for line in commands()}
    assert {"train.py", "sample.py", "eval_fid.py", "explain.py", "bench.py", "mocet.py"} <= files and len(commands()) > 15


def test_a_training_command_with_a_wrong_flag_would_be_noticed():
    with pytest.raises((SystemExit, config.UserError)):
        config.parse_run("", [*SMALL, "--run", "x", "--no_such_flag", "1"])
