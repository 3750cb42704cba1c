"""Every command that a page, the head of a file or the Makefile shows runs, on small data.

What cannot run here is in PARSED with the reason; its flags are still read by the program's own
parser. A new command is run like the others, so one that fails, or takes too long, is noticed.
The log of experiments is history and is left out, and so is what says "at commit".
"""
import ast
import importlib
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
from PIL import Image
from torch.distributed.run import get_args_parser

import config
from d2it import presets
from experiments import grain, order
from helpers import ROOT, SMALL, held_shapes, made_once, some_shapes
from plumbing import run
from plumbing.flags import UserError

PAGES = ("README.md", "PAPER.md", "EXERCISES.md", "CONTRIBUTING.md", "d2it/README.md",
         "experiments/README.md", "experiments/SPEED.md", "experiments/IMAGENET.md",
         "experiments/RECORDS.md", "tests/README.md", "Makefile")
FOLDERS = ("", "plumbing/", "evaluation/", "d2it/", "experiments/", "tests/")
COMMAND = r"(?:\w+=\S+ )?(?:python|torchrun) (?=\S)"
# Other people's programs, and one process of torchrun, which is no command by itself.
ELSEWHERE = ("python evaluator.py", "python -m ruff", "python -m venv", "torchrun --max-restarts")

# ------------------------------------------------------------------------------------------------
# which commands there are

def of_text(text: str) -> set[str]:
    """Commands in indented lines and in code spans, those that go on below as one line."""
    text = text.replace("$(BIN)/", "").replace("$(RUN)", "runs/demo")
    text = re.sub(r"\s*\\\n\s*", " ", text.replace("$(D2IT)", "runs/demo-d2it"))
    lines = re.findall(rf"^(?:    |\t|Run +|Try +)\s*({COMMAND}.*)$", text, flags=re.M)
    lines += re.findall(rf"`({COMMAND}[^`]+)`(?! at commit)", re.sub(r"\n +", " ", text))
    found = set()
    for line in lines:
        for part in re.split(r" && | & ", re.split(r"\s{2,}| #", line)[0]):
            if re.match(COMMAND, part):
                found.add(re.sub(r" >.*|[\[\]]", "", part).strip())
    return found


def commands() -> dict[str, str]:
    """{command: where it was found}"""
    found = {}
    for page in PAGES:
        found |= dict.fromkeys(of_text((ROOT / page).read_text(encoding="utf-8")), page)
    for file in [file for folder in FOLDERS for file in (ROOT / folder).glob("*.py")]:
        head = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8")), clean=False) or ""
        found |= dict.fromkeys(of_text(head), str(file.relative_to(ROOT)))
    return {line: found[line] for line in sorted(found) if not line.startswith(ELSEWHERE)}


def split(line: str) -> tuple[str, list[str], list[str]]:
    """A command -> the file that it starts, that file's flags, and torchrun's."""
    words = shlex.split(line)
    while re.match(r"\w+=", words[0]):  # OMP_NUM_THREADS=1
        words = words[1:]
    launcher, words = [], words[1:]
    if line.startswith("torchrun"):
        try:
            known = get_args_parser().parse_args(words)
        except SystemExit:  # a flag of ours that it takes for its own
            raise AssertionError(f"torchrun refuses: {line}") from None
        launcher = words[:len(words) - len(known.training_script_args)]
        words = ["-m"] * known.module + [known.training_script, *known.training_script_args]
        words = [word for word in words if word != "--"]
    if words[0] == "-m":
        return words[1].replace(".", "/") + ".py", words[2:], launcher
    return words[0], words[1:], launcher


# ------------------------------------------------------------------------------------------------
# small

FEW = "--base_steps 2 --continuous_steps 1 --grow_steps 1 --finetune_steps 1 --generator_steps 1"
SIZES = "--image_size 32 --patch_size 8 --encoder_depth 1 --decoder_depth 1 --workers 0"
TRAIN = [*SMALL[2:], *FEW.split(), *SIZES.split()]
D2IT = ("--dvae_width 8 --content_width 32 --content_depth 1 --refine_depth 1 --content_heads 2 "
        "--grain_width 32 --grain_depth 1 --grain_heads 2 --batch_size 8 --dvae_steps 2 "
        "--grain_steps 2 --content_steps 2 --workers 0 --device cpu").split()
SMALLER = {  # program: what is put behind its flags
    "train.py": TRAIN,
    "d2it/train.py": D2IT,
    "experiments/bench.py": "--quick --rows encode".split(),  # all: test_bench.py
    "experiments/tour.py": ["--quick"],
    "experiments/grain.py": "--quick --arms entropy d2it-4+2".split(),
    "experiments/order.py": ("--quick --arms titok nativetok-hnt --budget 20 --generator_steps 1 "
                             "--num_samples 20").split(),
    "experiments/judge.py": ["--steps", "1"],
    "experiments/rate.py": ["--steps", "2", "--num_images", "5"],
    "experiments/flow.py": "--num_samples 20 --scales 1 --brief".split(),
    "experiments/pca.py": ["--image_size", "8"],
    "d2it/explain.py": ["--images", "2"],
    "tests/fuzz.py": ["--count", "2"],
}
NUMBERS = {"--tokens": "6", "--num_samples": "20", "--num_images": "5", "--train_features": "5",
           "--steps": "2", "--prefixes": "1 2 6", "--batch_size": "8", "--per_class": "1"}
NEW = ("--npz", "--out", "--json")  # files and folders that are made
# Many seconds of a core; run with make test-faults, like all trainings but the small presets'.
SLOW = ("experiments/order.py", "experiments/grain.py", "evaluation/tinycnn.py", "micro.py")


def reason(line: str, file: str) -> str:
    """Why a command cannot run here, or ""; then its flags are parsed and no more."""
    if "--features inception" in line or "VIRTUAL" in line:
        return "Inception's weights, ImageNet's statistics"
    if "--cuda_graph" in line or "--device cuda" in line:
        return "a GPU"
    if line.startswith("python -m pytest"):
        return "the tests themselves"
    return ""


def small(line: str) -> tuple[str, list[str]]:
    """A command -> its file and flags, on what `place` has: @data, @val, @run, @new, ..."""
    file, words, _ = split(line)
    d2it, flags, before = file.startswith("d2it/") or "d2it" in line and "record" in line, [], ""
    for word in words:
        if word.startswith("--"):
            before = word
            if word not in ("--device", "--skip_bad"):
                flags.append(word)
        elif word == "...":  # as above
            given = {"--data": ["@data"], "--val_data": ["@val"]}
            flags += given.get(before) or (
                "--data @data --val_data @val".split() if "speedrun" in file else [])
        elif before in ("--data", "--images", "--val_data"):
            flags.append({"--val_data": "@val"}.get(before, "@data"))
        elif before == "--run":
            flags.append("@new" if file.endswith("train.py") else "@d2it" if d2it else "@run")
        elif before == "--against":
            one = "@coarse" if "@fine" in flags else "@fine"
            flags.append(one if d2it else "@run")
        elif before in ("--reconstruct", "--grain"):
            flags.append("@photo")
        elif before == "--classes":
            flags.append("ring" if "disc" in flags else "disc")
        elif before in ("--judge", "--chooser"):
            flags.append("@made/judge.pt" if "--train_features" in words else
                         "@whole" if file == "experiments/order.py" else "@judge")
        elif before in NUMBERS:
            flags += NUMBERS[before].split() if flags[-1] == before else []
        elif before in NEW:
            flags.append("@made/" + os.path.basename(word))
        elif before != "--device":
            flags.append(re.sub("^steps=.*", "steps=1,6", word))
        if before == "--" and file == "experiments/speedrun.py":
            break
    if file.endswith("train.py") and "--run" not in flags:
        flags += ["--run", "@new"]
    if file.endswith("train.py") and "--data" not in flags:
        flags += ["--data", "@data"]
    if flags[-1:] == ["--train_features"]:
        flags.append("5")
    for program, flag, other in (("eval_fid.py", "--num_samples", ""),
                                 ("experiments/search.py", "--num_images", ""),
                                 ("d2it/sample.py", "--steps", "--reconstruct")):
        if file == program and flag not in flags and other not in flags:
            flags += [flag, NUMBERS[flag]]
    if "--table" in flags:  # on the results that are kept
        return file, flags
    if "--quick" in SMALLER.get(file, ()):  # which has sizes and seeds of its own
        flags = shlex.split(re.sub(r"--(preset|seeds|quick)( [^-]\S*)*", "", shlex.join(flags)))
    if file == "experiments/speedrun.py":
        flags = [*flags[:flags.index("--") if "--" in flags else None], "--out", "@new", "--steps",
                 "2", "--", *TRAIN, "--base_steps", "2", "--token_schedule", "6"]
    if file in ("experiments/order.py", "experiments/grain.py"):
        flags += ["--out", "@new"]
        flags += [] if "--data" in flags else ["--data", "@data", "--val_data", "@val"]
    return file, [*flags, *SMALLER.get(file, [])]


def is_slow(line: str, file: str) -> bool:
    if "--table" in line:
        return False
    return file in SLOW or "--against" in line or (
        file.endswith("train.py") and re.search("--preset (?!tiny|d2it-tiny)", line) is not None)


def different(lines: list[str]) -> list:
    """Of commands that are the same when they are small, one. Marked as faults are slow ones, and
    those of which longer ones of the same program have all flags."""
    chosen, seen = {}, set()
    for line in sorted(lines, key=lambda line: -len(small(line)[1])):
        file, flags = small(line)
        new = {file, *((file, flag) for flag in flags if flag.startswith("--"))} - seen
        slow = is_slow(line, file)
        seen |= set() if slow else new
        chosen.setdefault((file, frozenset(flags)), pytest.param(
            line, marks=[pytest.mark.faults] * (slow or not new), id=line))
    return list(chosen.values())


COMMANDS = commands()
PARSED = [line for line in COMMANDS if reason(line, split(line)[0])]
RUN = [line for line in COMMANDS if line not in PARSED]

PARSERS = {"train.py": lambda flags: config.parse_run("", flags),
           "d2it/train.py": lambda flags: presets.parse_run("", flags),
           "experiments/order.py": order.parse, "experiments/grain.py": grain.parse}

# ------------------------------------------------------------------------------------------------
# running


def fill(folder: Path) -> None:
    """Images, a run of each system, a judge."""
    data = some_shapes(folder / "data.npz", 60)
    held_shapes(folder / "val.npz", 30)
    Image.fromarray(np.arange(1200, dtype=np.uint8).reshape(20, 20, 3)).save(folder / "photo.jpg")
    start("train.py", [*SMALL, "--run", str(folder / "run"), "--data", data], folder)
    few = ["--train_features", "5", "--num_samples", "20"]
    start("eval_fid.py", ["--run", str(folder / "run"), *few], folder)
    start("eval_fid.py", ["--images", data, "--data", data, "--judge", str(folder / "judge.pt"),
                          *few], folder)
    start("experiments/judge.py", ["--data", data, "--val_data", str(folder / "val.npz"), "--out",
                                   str(folder / "whole.pt"), "--steps", "1"], folder)
    for name, *more in (("d2it",), ("fine", "--grain_policy", "fine", "--stage", "1"),
                        ("coarse", "--grain_policy", "coarse", "--stage", "1")):
        start("d2it/train.py", ["--preset", "d2it-tiny", "--run", str(folder / name), "--data",
                                data, *D2IT, *more], folder)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder in which commands find what they name. Commands may run in any order, in any of
    pytest's processes: each process has a copy of its own, and none waits for another's run."""
    importlib.import_module("torch._dynamo")  # as every optimizer does: once, not in each child
    patch = pytest.MonkeyPatch()
    patch.setattr(run, "EVAL_IMAGES", 20)  # the children that start() makes have it too
    made = made_once(tmp_path_factory, "commands", fill)
    yield shutil.copytree(made, tmp_path_factory.mktemp("reader") / "place")
    patch.undo()


def start(file: str, flags: list[str], folder: Path, codes=(0,)) -> str:
    """Run a file of ours as its user does, in a child that has all packages in memory already;
    -> what it said."""
    child = multiprocessing.get_context("fork").Process(target=run_as_main,
                                                        args=(file, flags, folder))
    child.start()
    child.join(300)
    if child.exitcode is None:
        child.kill()
    said = (folder / "said.txt").read_text(encoding="utf-8", errors="replace")
    assert child.exitcode in codes, f"{file} {shlex.join(flags)}\n{said[-2000:]}"
    return said


def run_as_main(file: str, flags: list[str], folder: Path) -> None:
    os.chdir(folder)
    said = os.open("said.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(said, 1)
    os.dup2(said, 2)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)
    sys.argv = [file, *flags]
    if "/" in file and not file.startswith("tests/"):
        module = file.removesuffix(".py").replace("/", ".")
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(str(ROOT / file), run_name="__main__")
    sys.stdout.flush()


def at(place: Path, flags: list[str], new: Path) -> list[str]:
    """The flags with their places filled in."""
    paths = {"@data": place / "data.npz", "@val": place / "val.npz", "@photo": place / "photo.jpg",
             "@judge": place / "judge.pt", "@whole": place / "whole.pt",
             "@new": new / "new", "@made": new}
    paths |= {f"@{name}": place / name for name in ("run", "d2it", "fine", "coarse")}
    for i, word in enumerate(flags):
        name, _, rest = word.partition("/")
        if name in paths:
            flags[i] = str(paths[name] / rest)
    return flags


@pytest.mark.parametrize("line", different(RUN))
def test_a_command_runs(line, place, tmp_path):
    file, flags = small(line)
    flags = at(place, flags, tmp_path)
    if "--table" in flags:
        kept = "order-cifar" if "order" in file else "grain-tiny"
        shutil.copytree(ROOT / "experiments/results" / kept, tmp_path / "OUT")
    codes = (0, 1) if file == "experiments/speedrun.py" else (0,)  # 1: the record stands
    if "--stage" in flags:  # the stages before it first
        last = flags.index("--stage") + 1
        for stage in range(1, int(flags[last])):
            start(file, [*flags[:last], str(stage), *flags[last + 1:]], place)
    said = start(file, flags, place, codes)
    assert said.strip() and "Traceback" not in said and (codes == (0,) or "passed" in said)


@pytest.mark.parametrize("line", PARSED)
def test_the_flags_of_a_command_that_cannot_run_here_are_read(line, place, tmp_path):
    file, flags, _ = split(line)
    if line.startswith("python -m pytest"):
        files = [word for word in flags if word.endswith(".py") and "FILE" not in word]
        assert all((ROOT / name).exists() for name in files)
        return
    assert (ROOT / file).exists()
    flags = at(place, small(line)[1], tmp_path)
    assert importlib.import_module(file.removesuffix(".py").replace("/", ".")).parse(flags)


@pytest.mark.parametrize("file", ("d2it/grain.py", "plumbing/shapes.py"))
def test_a_module_that_draws_says_in_one_line_where_it_cannot(file, tmp_path):
    (tmp_path / f"{Path(file).stem}.png").mkdir()
    said = start(file, [], tmp_path, codes=(2,))
    assert said.startswith("error: ") and said.count("\n") == 1


def test_a_command_that_fails_would_be_noticed(tmp_path):
    with pytest.raises(AssertionError, match="no_such_folder"):
        start("explain.py", ["--run", "no_such_folder"], tmp_path)


def test_flags_of_trainings_are_read_as_they_stand(tmp_path, monkeypatch):
    """Above they run with others behind them, which win."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "judge.pt").touch()  # parsing asks only whether it is there
    for line in RUN:
        file, flags, _ = split(line)
        if file in PARSERS:
            assert PARSERS[file]([flag for flag in flags if flag != "..."]).preset, line
    for file in ("train.py", "d2it/train.py"):
        with pytest.raises((SystemExit, UserError)):
            PARSERS[file](["--no_such_flag", "1"])


def test_a_run_flag_that_torchrun_would_take_for_its_own_would_be_noticed():
    with pytest.raises(AssertionError, match="torchrun refuses"):
        split("torchrun --nproc_per_node=8 -m d2it.train --run runs/mine")
    file, flags, launcher = split("torchrun --nproc_per_node=8 -m d2it.train -- --run runs/mine")
    assert (file, flags) == ("d2it/train.py", ["--run", "runs/mine"]) and launcher


def test_commands_are_found_everywhere():
    text = ("    python a.py --x 1 \\\n        --y 2   # why\n`python -m a.b`, `python c.py` at "
            "commit 1\nTry      python d.py      (a second)\n\tpython e.py & python f.py\n")
    assert of_text(text) == {"python a.py --x 1 --y 2", "python -m a.b", "python d.py",
                             "python e.py", "python f.py"}
    where = set(COMMANDS.values())
    assert {"README.md", "d2it/README.md", "Makefile", "experiments/pca.py"} <= where
    assert len(COMMANDS) > 80 and len(PARSED) < 12
    files = {split(line)[0] for line in COMMANDS}
    told = {path for folder in FOLDERS for path in (ROOT / folder).glob("*.py")
            if re.search(r'^if __name__ == "__main__":', path.read_text("utf-8"), flags=re.M)}
    told -= {ROOT / "tests/faulty_train.py", ROOT / "tests/same_noise.py"}  # for tests alone
    assert {str(path.relative_to(ROOT)) for path in told} <= files, "none says how to start it"


@pytest.mark.parametrize("words", ("sample.py --help", pytest.param(
    "-m plumbing.images", marks=pytest.mark.faults)))
def test_a_new_python_finds_everything(words, tmp_path):
    """The other commands run in children of this process, which knows where the project is."""
    program = [str(ROOT / word) if word.endswith(".py") else word for word in words.split()]
    folder = tmp_path if program[0] != "-m" else ROOT
    done = subprocess.run([sys.executable, *program], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout, done.stderr[-2000:]


def test_make_targets_exist():
    targets = re.findall(r"^(\w[\w-]*):", (ROOT / "Makefile").read_text(), flags=re.M)
    named = set()
    for page in PAGES:
        text = (ROOT / page).read_text(encoding="utf-8")
        named |= set(re.findall(r"(?:^    |`)make ([\w-]+)", text, flags=re.M))
    assert named and named <= set(targets)
