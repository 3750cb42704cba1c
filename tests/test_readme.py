"""The pages say what is true: links lead somewhere, quoted code is in its file, commands run.

Their tables of numbers: test_numbers.py.
"""
import multiprocessing
import os
import re
import runpy
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
import train
from helpers import SMALL, some_shapes
from nativetok import NativeTok
from plumbing.flags import UserError

ROOT = Path(__file__).parent.parent
NAMES = ("README.md", "EXERCISES.md", "experiments/README.md", "CONTRIBUTING.md", "tests/README.md")
PAGES = {name: (ROOT / name).read_text(encoding="utf-8") for name in NAMES}
README = PAGES["README.md"]
HOUSE = [*ROOT.glob("*.py"), *ROOT.glob("plumbing/*.py"), *ROOT.glob("evaluation/*.py")]
HOUSE = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in sorted(HOUSE)}


def section(title: str) -> str:
    return README.split(f"\n## {title}\n")[1].split("\n## ")[0]


def plain(line: str) -> str:
    """A line of code without the spaces that only align it."""
    return re.sub(r"\s+", " ", line.strip())


def lines_of(file: str) -> set[str]:
    return {plain(line) for line in (ROOT / file).read_text(encoding="utf-8").splitlines()}


# ------------------------------------------------------------------------------------------------
# links, files, sections

def anchors(page: str) -> set[str]:
    """The headings of a page as GitHub spells them in links."""
    headings = re.findall(r"^#+ (.*)$", page, flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", PAGES)
def test_every_relative_link_leads_to_a_file_and_a_section_in_it(name):
    links = re.findall(r"\]\(([^)\s]+)\)", PAGES[name])
    for link in links:
        if link.startswith("http"):
            continue
        file, _, anchor = link.partition("#")
        path = (ROOT / name).parent / file if file else ROOT / name
        assert path.exists(), link
        if anchor:
            assert anchor in anchors(path.read_text(encoding="utf-8")), link
    assert links or name == "tests/README.md"


@pytest.mark.parametrize("name", PAGES)
def test_every_file_that_is_named_exists(name):
    """`like_this.py` is a file of ours, in the root or beside the page; evaluator.py is ADM's."""
    for file in re.findall(r"`([\w/.-]+\.(?:py|md|toml|txt))`", PAGES[name]):
        assert (ROOT / file).exists() or (ROOT / name).parent.joinpath(file).exists(), file


def test_sections_that_the_code_refers_to_exist():
    pattern = r'((?:experiments/)?README)(?:\.md)?, "([^"]+)"'
    found = 0
    for path in [*ROOT.glob("*.py"), *ROOT.glob("*/*.py")]:
        for page, title in re.findall(pattern, path.read_text(encoding="utf-8")):
            headings, found = re.findall(r"^#+ (.*)$", PAGES[f"{page}.md"], flags=re.M), found + 1
            known = any(title in heading for heading in headings)
            assert known, f"{path.name} sends its reader to {page}, {title!r}"
    assert found


def test_every_flag_that_is_named_exists():
    """`--flags` anywhere in the pages, against the source that reads them."""
    sources = [*ROOT.glob("*.py"), *ROOT.glob("*/*.py")]
    sources = " ".join(path.read_text(encoding="utf-8") for path in sources)
    others = {"nproc_per_node", "nnodes", "rdzv_backend", "rdzv_endpoint", "max-restarts"}
    fields = {field for part in config.load_preset("tiny") for field in vars(part)}
    for name, page in PAGES.items():
        for flag in set(re.findall(r"--([a-z][\w-]+)", page)) - others:
            known = {flag, flag.removeprefix("no-")} & fields
            assert known or f'"--{flag}"' in sources or f'"{flag}"' in sources, f"{name}: --{flag}"


def test_the_tests_that_are_listed_exist():
    """`test_file::the_name…`, and `::another_name…` in the same file; … stands for the rest."""
    named, file = 0, ""
    for before, test in re.findall(r"`(test_\w+|)(?:::(\w+)…?)?`", PAGES["tests/README.md"]):
        file, named = before or file, named + 1
        text = (ROOT / "tests" / f"{file}.py").read_text(encoding="utf-8")
        assert f"def test_{test}" in text or not test, f"{file}::{test}"
    assert named > 30


# ------------------------------------------------------------------------------------------------
# the front page

def test_the_files_of_the_root_are_all_in_the_table():
    table = section("The files, in reading order")
    named = re.findall(r"\[(\w+\.py)\]\(\1\)", table)
    assert sorted(named) == sorted(file for file in HOUSE if "/" not in file)


def test_the_lines_of_the_tour_are_in_their_files():
    tour = section("Ten minutes with one image")
    steps = re.findall(r"\*\*\d\..*?`(\w+\.py)`.*?```python\n(.*?)```", tour, flags=re.S)
    assert len(steps) == 6
    for file, code in steps:
        for line in code.splitlines():
            assert plain(line) in lines_of(file), f"{file} does not hold: {line}"


def test_the_lines_that_exercises_change_are_in_their_files():
    """Each ```python block of EXERCISES.md quotes the file that was named last before it, but for
    programs, which begin with their imports."""
    quoted = 0
    for part in re.split(r"^## ", PAGES["EXERCISES.md"], flags=re.M):
        for before, code in re.findall(r"((?:(?!```).)*)```python\n(.*?)```", part, flags=re.S):
            if code.startswith("import"):
                continue
            file, quoted = re.findall(r"`(\w+\.py)`", before)[-1], quoted + 1
            for line in code.splitlines():
                assert plain(line) in lines_of(file), f"{file} does not hold: {line}"
    assert quoted


def test_an_expert_of_ones_own_trains_through_all_stages_and_loads(tmp_path):
    """The program of that exercise as it stands there, at small sizes."""
    code, = [code for code in re.findall(r"```python\n(.*?)```", PAGES["EXERCISES.md"], flags=re.S)
             if "class FixedGaze" in code]
    names = {"__name__": "exercise"}
    exec(code, names)
    data = some_shapes(tmp_path / "shapes.npz", 60)
    flags = [*SMALL, "--data", data, "--run", str(tmp_path / "run"), "--generators", "ar"]
    train.main(config.parse_run("", flags), change_model=names["fixed_gaze"])
    model = NativeTok.load(str(tmp_path / "run" / "tokenizer.pt"), names["fixed_gaze"])
    assert {type(expert) for expert in model.mocet.experts} == {names["FixedGaze"]}
    assert len(model.mocet.experts) == model.cfg.num_tokens > model.cfg.token_schedule[0]
    images = torch.rand(4, 3, 32, 32) * 2 - 1
    model.quantizer.eval()
    loop = model.mocet.forward_loop(model.mit(images), model.quantizer)[1]
    assert torch.equal(model.encode(images), loop)


def test_the_table_of_phases_is_the_plan_of_the_program():
    tok, _, settings = config.load_preset("tiny")
    plan = {phase.name: phase for phase in train.phases(tok, settings)}
    row = r"^\| (base|grow|finetune).*?\| (\d) \| (.*) \|$"
    rows = re.findall(row, section("Stages and commands"), flags=re.M)
    assert len(rows) == 3
    for name, stage, cells in rows:
        phase = next(phase for key, phase in plan.items() if key.startswith(name))
        learns = ["learns" if part in phase.learns else "frozen" for part in train.PARTS]
        assert int(stage) == phase.stage and cells.split(" | ") == learns, name


def test_the_python_of_the_front_page_runs(small_run, tmp_path, monkeypatch):
    code, = re.findall(r"```python\n(import torch.*?)```", README, flags=re.S)
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(code.replace("runs/demo", str(small_run)), names)
    length = names["tokenizer"].num_tokens
    assert names["ids"].shape == (1, length) and names["new"].shape == (3, length)
    assert names["rough"].shape == names["images"].shape == (1, 3, 32, 32)
    written, = tmp_path.iterdir()
    assert Image.open(written).width > 3 * 32


# ------------------------------------------------------------------------------------------------
# commands

ELSEWHERE = ("python evaluator.py", "python -m pytest")  # other people's programs


def commands() -> list[str]:
    """Every command of the pages that starts a file of ours: indented lines and code spans."""
    found = set()
    for page in PAGES.values():
        lines = re.findall(r"^    (\S.*)$", page, flags=re.M)
        lines += re.findall(r"`((?:OMP|python|torchrun)[^`\n]*)`", page.replace("\n   ", " "))
        for line in lines:
            line = re.split(r"\s{2,}[#(]|\s#|\.\.\.", line.strip())[0].strip()
            ours = re.match(r"(OMP_NUM_THREADS=1 )?(python|torchrun) (.*\.py|-m \w+\.)", line)
            if ours and not line.startswith(ELSEWHERE):
                found.add(line)
    return sorted(found)


def test_make_targets_exist():
    targets = re.findall(r"^(\w[\w-]*):", (ROOT / "Makefile").read_text(), flags=re.M)
    named = set()
    for page in PAGES.values():
        named |= set(re.findall(r"(?:^    |`)make ([\w-]+)", page, flags=re.M))
    assert named and named <= set(targets)


@pytest.fixture(scope="module")
def seen():
    """Commands that have run: two that differ only in what is replaced here need not both."""
    return set()


@pytest.fixture(scope="module")
def place(small_run, tmp_path_factory):
    """A folder in which commands find what they name: images of every name used, the small run."""
    folder = tmp_path_factory.mktemp("reader")
    some_shapes(folder / "shapes.npz", 60)
    Image.fromarray(np.full((40, 30, 3), 90, np.uint8)).save(folder / "photo.jpg")
    shutil.copytree(small_run, folder / "run")
    # Commands may run in any order, in any of pytest's processes: none waits for another's judge.
    start("eval_fid.py", ["--run", str(folder / "run"), "--train_features", "5",
                          "--num_samples", "20"], folder)
    return folder


def program_and_flags(line: str) -> tuple[str, list[str]]:
    """A command -> the file that it starts and its words; `python -m a.b` starts a file too."""
    words = shlex.split(line)
    while re.match(r"\w+=", words[0]):  # OMP_NUM_THREADS=1
        words = words[1:]
    words = words[words.index("--") + 1:] if words[0] == "torchrun" else words[1:]
    if words[0] == "-m":
        return words[1].replace(".", "/") + ".py", words[2:]
    return words[0], words[1:]


def arguments(line: str, place: Path) -> tuple[str, list[str]]:
    """The same, with data and run of `place`."""
    file, flags = program_and_flags(line)
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
            flags[i] = str(min(int(word), 6))  # the small run has six tokens
        elif word.startswith("steps="):
            flags[i] = "steps=1,6"
    return file, flags


def start(file: str, flags: list[str], folder: Path) -> None:
    """Run a file of ours as its user does, in a child that has all packages in memory already."""
    context = multiprocessing.get_context("fork")
    child = context.Process(target=run_as_main, args=(file, flags, folder))
    child.start()
    child.join(300)
    if child.exitcode is None:
        child.kill()
    said = (folder / "said.txt").read_text(encoding="utf-8", errors="replace")
    assert child.exitcode == 0, f"{file} {shlex.join(flags)}\n{said[-2000:]}"


def run_as_main(file: str, flags: list[str], folder: Path) -> None:
    os.chdir(folder)
    said = os.open("said.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(said, 1)
    os.dup2(said, 2)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)
    sys.argv = [file, *flags]
    if "/" in file:
        module = file.removesuffix(".py").replace("/", ".")
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(str(ROOT / file), run_name="__main__")
    sys.stdout.flush()


@pytest.mark.parametrize("line", commands())
def test_commands_run(line, place, seen):
    """Training commands are parsed, others run on a small run; long ones only print their help."""
    file, flags = arguments(line, place)
    assert (ROOT / file).exists(), line
    if file == "train.py" and "--help" not in flags:
        if "--run" in flags:
            flags[flags.index("--run") + 1] = str(place / "new")
        # raises for a flag or value that is wrong
        assert config.parse_run("", flags).preset in config.PRESETS
        return
    if file.startswith("experiments/") or "inception" in flags or "VIRTUAL" in line:
        flags = ["--help"]  # minutes or hours, or files of others
    elif file == "eval_fid.py":
        flags += ["5"] * (flags[-1] == "--train_features") + ["--num_samples", "20"]
    tried = not flags and f"python {file}" in " ".join(tries().values())  # runs below
    if not tried and (file, *flags) not in seen:
        seen.add((file, *flags))
        start(file, flags, place)


@pytest.mark.parametrize("words", ("sample.py --help", "-m plumbing.images"))
def test_a_new_python_finds_everything(words, tmp_path):
    """The other commands run in children of this process, which knows where the project is."""
    program = [str(ROOT / word) if word.endswith(".py") else word for word in words.split()]
    folder = tmp_path if program[0] != "-m" else ROOT
    done = subprocess.run([sys.executable, *program], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout, done.stderr[-2000:]


def test_a_command_that_fails_would_be_noticed(tmp_path):
    with pytest.raises(AssertionError, match="no_such_folder"):
        start("explain.py", ["--run", "no_such_folder"], tmp_path)


def test_the_list_of_commands_is_not_empty():
    files = {program_and_flags(line)[0] for line in commands()}
    assert {"train.py", "sample.py", "eval_fid.py", "explain.py", "mocet.py"} <= files
    assert {"experiments/bench.py", "plumbing/images.py"} <= files and len(commands()) > 15


def test_a_training_command_with_a_wrong_flag_would_be_noticed():
    with pytest.raises((SystemExit, UserError)):
        config.parse_run("", [*SMALL, "--run", "x", "--no_such_flag", "1"])


# ------------------------------------------------------------------------------------------------
# what the files themselves say

def tries() -> dict[str, str]:
    """{file: the command of its Try line}"""
    found = {}
    for file, text in HOUSE.items():
        if match := re.search(r"^Try +(python .*?)(?:  .*)?$", text, flags=re.M):
            found[file] = match[1]
    return found


def test_a_file_that_runs_says_how():
    for file, text in HOUSE.items():
        if 'if __name__ == "__main__":' in text:
            head = text.split('"""')[1]
            said = re.search(r"^(Try|Run) +(python|torchrun) ", head, flags=re.M)
            said = said or f"python {file}" in head
            assert said, f"{file} has a main and neither Try nor Run in its head"
    assert len(tries()) > 12


@pytest.mark.parametrize("file", tries())
def test_try_lines_run(file, tmp_path):
    named, flags = program_and_flags(tries()[file])
    assert named == file, "a Try line starts its own file"
    start(file, flags, tmp_path)


# ------------------------------------------------------------------------------------------------
# torchrun, which takes our flags for its own without a --

def torchrun_lines() -> dict[str, str]:
    """{command: where it stands}, of all pages and docstrings; a backslash goes on."""
    found = {}
    for path in [*ROOT.rglob("*.md"), *ROOT.glob("*.py"), *ROOT.glob("d2it/*.py")]:
        text = path.read_text(encoding="utf-8").replace("\\\\\n", " ").replace("\\\n", " ")
        for line in re.findall(r"torchrun (--[^`\n]*)", text):
            line = re.split(r"\s{2,}\(", line)[0].replace("...", "--run runs/x").strip(" .")
            if re.search(r"\.py|-m ", line):
                found[line] = str(path.relative_to(ROOT))
    return found


def program_of(line: str) -> list[str]:
    """What torchrun would start, by its own reading of the command line."""
    from torch.distributed.run import get_args_parser
    args = get_args_parser().parse_args(shlex.split(line))
    return [*["-m"] * args.module, args.training_script, *args.training_script_args]


@pytest.mark.parametrize("line", torchrun_lines())
def test_torchrun_leaves_our_flags_to_our_program(line, capsys):
    words = [word for word in program_of(line) if word != "--"]
    if words[0] == "-m":
        assert (ROOT / (words[1].replace(".", "/") + ".py")).exists() and "--run" in words[2:]
    else:
        assert (ROOT / words[0]).exists() and len(words) > 1


def test_a_torchrun_line_without_its_dashes_would_be_noticed(capsys):
    assert {"d2it/README.md", "d2it/train.py", "train.py"} <= set(torchrun_lines().values())
    with pytest.raises(SystemExit):
        program_of("--nproc_per_node=8 -m d2it.train --data DIR --run runs/mine")
