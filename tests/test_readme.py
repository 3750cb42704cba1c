"""The pages say what is true: links lead somewhere, quoted code is in its file.

Their tables of numbers: test_numbers.py. Their commands: test_commands.py.
"""
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import mse_loss

import config
import train
from helpers import SMALL, some_shapes
from nativetok import NativeTok
from plumbing.datasets import open_images

ROOT = Path(__file__).parent.parent
NAMES = ("README.md", "PAPER.md", "EXERCISES.md", "CONTRIBUTING.md", "experiments/README.md",
         "experiments/SPEED.md", "experiments/IMAGENET.md", "tests/README.md", "d2it/README.md")
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
def test_every_link_and_every_named_file_leads_somewhere(name):
    """`like_this.py` is a file of ours, in the root or beside the page; evaluator.py is ADM's."""
    links = re.findall(r"\]\((?!http)([^)\s]+)\)", PAGES[name])
    for link in links:
        file, _, anchor = link.partition("#")
        path = (ROOT / name).parent / file if file else ROOT / name
        assert path.exists(), link
        assert not anchor or anchor in anchors(path.read_text(encoding="utf-8")), link
    for file in re.findall(r"`([\w/.-]+\.(?:py|md|toml|txt))`", PAGES[name]):
        assert (ROOT / file).exists() or (ROOT / name).parent.joinpath(file).exists(), file
    assert links or name == "tests/README.md"


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
        page = re.sub(r"`[^`]+` at commit", "", page)  # what is gone
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
    exercises = re.findall(r"`(test_\w+)`\s+in\s+`(tests/\w+\.py)`", PAGES["EXERCISES.md"])
    assert exercises
    for test, file in exercises:
        assert f"def {test}(" in (ROOT / file).read_text(encoding="utf-8"), test


# ------------------------------------------------------------------------------------------------
# the front page

def test_the_files_of_the_root_are_all_in_the_table():
    table = section("The files, in reading order")
    named = re.findall(r"\[(\w+\.py)\]\(\1\)", table)
    assert sorted(named) == sorted(file for file in HOUSE if "/" not in file)


@pytest.mark.parametrize("page", [section("Ten minutes with one image"), PAGES["EXERCISES.md"],
                                  PAGES["d2it/README.md"]],
                         ids=["the tour", "the exercises", "d2it"])
def test_lines_that_a_page_quotes_are_in_their_files(page):
    """Each ```python block quotes the file that was named last before it, but for programs, which
    begin with their imports."""
    quoted = 0
    for before, code in re.findall(r"((?:(?!```).)*)```python\n(.*?)```", page, flags=re.S):
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
    loop = model.eval().mocet.forward_loop(model.mit(images), model.quantizer)[1]
    assert torch.equal(model.encode(images), loop)


def test_the_table_of_phases_is_the_plan_of_the_program():
    tok, *_, settings = config.load_preset("tiny")
    plan = {phase.name: phase for phase in train.phases(tok, settings)}
    row = r"^\| (base|grow|finetune).*?\| (\d) \| (.*) \|$"
    rows = re.findall(row, section("How it trains"), flags=re.M)
    assert len(rows) == 3
    for name, stage, cells in rows:
        phase = next(phase for key, phase in plan.items() if key.startswith(name))
        learns = ["learns" if part in phase.learns else "frozen" for part in train.PARTS]
        assert int(stage) == phase.stage and cells.split(" | ") == learns, name


def test_the_training_step_of_the_front_page_learns():
    """As it stands there, 20 times, on eight noisy images."""
    code, = re.findall(r"```python\n(model = .*?)```", section("How it trains"), flags=re.S)
    losses = []

    def loss_and_note(recon, images):
        losses.append(mse_loss(recon, images))
        return losses[-1]
    torch.manual_seed(0)
    images = torch.rand(8, 3, 32, 32) * 2 - 1
    exec(code, {"NativeTok": NativeTok, "load_preset": config.load_preset, "torch": torch,
                "mse_loss": loss_and_note, "batches": [images] * 20})
    assert losses[-1] < 0.8 * losses[0]


def test_cifar_10_as_the_front_page_makes_it_is_read(tmp_path, monkeypatch):
    """From torchvision's data set, of which this test has a small one."""
    code, = re.findall(r"```python\n(import numpy.*?)```", README, flags=re.S)
    names = "airplane automobile bird cat deer dog frog horse ship truck".split()

    def cifar10(folder, train, download):
        return SimpleNamespace(data=np.full((20, 32, 32, 3), 50 + train, np.uint8),
                               targets=[*range(10)] * 2, classes=names)
    monkeypatch.setitem(sys.modules, "torchvision", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "torchvision.datasets", SimpleNamespace(CIFAR10=cifar10))
    (tmp_path / "cifar10").mkdir()  # where torchvision lays what it has loaded
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    train, test = (open_images(f"cifar10/{name}.npz") for name in ("train", "test"))
    assert train.classes == test.classes == names and len(train) == len(test) == 20
    assert (train.load(0) == 51).all() and (test.load(0) == 50).all()


@pytest.mark.parametrize("labels", ([0], [0, 3, 7], [0, 3, 7, 9, 1]), ids=len)
def test_the_python_of_the_front_page_runs(labels, small_run, tmp_path, monkeypatch):
    """With as many labels as one likes: small batches once took a way of their own."""
    code, = re.findall(r"```python\n(import torch.*?)```", README, flags=re.S)
    assert "torch.tensor([0, 3, 7])" in code
    code = code.replace("torch.tensor([0, 3, 7])", f"torch.tensor({labels})")
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(code.replace("runs/demo", str(small_run)), names)
    length = names["tokenizer"].num_tokens
    assert names["ids"].shape == (1, length) and names["new"].shape == (len(labels), length)
    assert names["rough"].shape == names["images"].shape == (1, 3, 32, 32)
    written, = tmp_path.iterdir()
    assert Image.open(written).width >= 4 * 32
