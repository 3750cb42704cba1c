"""The pages say what is true: links lead somewhere, quoted code is in its file, commands run. Their numbers: test_numbers.py."""
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import config
from helpers import SMALL, some_shapes
from plumbing.flags import UserError

ROOT = Path(__file__).parent.parent
PAGES = {name: (ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "experiments/README.md", "CONTRIBUTING.md", "tests/README.md")}
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
    named = [(path.name, page, title) for path in [*ROOT.glob("*.py"), *ROOT.glob("*/*.py")]
             for page, title in re.findall(r'((?:experiments/)?README)(?:\.md)?, "([^"]+)"', path.read_text(encoding="utf-8"))]
    assert named
    for file, page, title in named:
        assert any(title in heading for heading in re.findall(r"^#+ (.*)$", PAGES[f"{page}.md"], flags=re.M)), f"{file} sends its reader to {page}, {title!r}"


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
    sources = " ".join(path.read_text(encoding="utf-8") for path in [*ROOT.glob("*.py"), *ROOT.glob("*/*.py")])
    torchrun = {"nproc_per_node", "nnodes", "node_rank", "rdzv_backend", "rdzv_endpoint", "rdzv_id", "max-restarts"}
    fields = {f for part in config.load_preset("tiny") for f in vars(part)}
    for page in PAGES.values():
        for flag in set(re.findall(r"--([a-z][\w-]+)", page)) - torchrun:
            assert flag in fields or flag.removeprefix("no-") in fields or f'"--{flag}"' in sources or f'flag("{flag}"' in sources, f"--{flag}"


# ------------------------------------------------------------------------------------------------
# commands

ELSEWHERE = ("python evaluator.py",)  # other people's programs


def commands() -> list[str]:
    """Every command of the pages that starts a file of ours, once: of indented lines, code spans and fences; comments left out."""
    found = []
    for page in PAGES.values():
        lines = re.findall(r"^    (\S.*)$", page, flags=re.M) + re.findall(r"`((?:OMP|python|torchrun)[^`\n]*)`", page.replace("\n   ", " ")) + re.findall(r"^(python .*)$", page, flags=re.M)
        for line in lines:
            line = re.split(r"\s{2,}[#(]|\s#|\.\.\.", line.strip())[0].strip()
            if re.match(r"(OMP_NUM_THREADS=1 )?(python|torchrun) (.*\.py|-m \w+\.)", line) and not line.startswith(ELSEWHERE):
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
    # python -m plumbing.batches names a file too
    file, flags = (words[1].replace(".", "/") + ".py", words[2:]) if words[0] == "-m" else (words[0], words[1:])
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
    return file, flags


@pytest.mark.parametrize("line", commands())
def test_commands_run(line, place, seen):
    """Training commands are parsed with their own settings; the others run on a small run. Long ones only parse."""
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
    if (file, *flags) in seen:
        return
    seen.add((file, *flags))
    program = ["-m", file.removesuffix(".py").replace("/", ".")] if "/" in file else [str(ROOT / file)]
    done = subprocess.run([sys.executable, *program, *flags], cwd=place, capture_output=True, text=True, timeout=300,
                          env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, f"{line}\n{done.stderr[-2000:]}"


def test_the_list_of_commands_is_not_empty():
    files = {arguments(line, Path("."))[0] for line in commands()}
    assert {"train.py", "sample.py", "eval_fid.py", "explain.py", "experiments/bench.py", "mocet.py"} <= files and len(commands()) > 15


def test_a_training_command_with_a_wrong_flag_would_be_noticed():
    with pytest.raises((SystemExit, UserError)):
        config.parse_run("", [*SMALL, "--run", "x", "--no_such_flag", "1"])
