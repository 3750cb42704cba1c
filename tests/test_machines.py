"""Where the code asks what machine, system, library or GPU it is on, both ways run here.

A table in README.md beside this file names each such question, and tests that force its answers.
"""
import ast
import importlib.util
import multiprocessing
import os
import re
import signal
import sys
import time
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from helpers import PNG, ROOT, folder_of, names, refused, same, take
from plumbing import batches, checkpoint, datasets, processes
from plumbing.batches import ImageStream
from plumbing.processes import Processes

# ------------------------------------------------------------------------------------------------
# the table

FOLDERS = (".", "plumbing", "evaluation", "d2it", "experiments")
CALLS = re.compile(r"(\.is_available|\.is_built|is_bf16_supported|device_count|is_compiling|"
                   r"get_device_capability|shutil\.which|find_spec)$")
NAMES = re.compile(r"^(sys\.platform|sys\.version_info|os\.name|os\.uname|ctypes\.\w+|"
                   r"Image\.OPEN)$")
# Printed they are words of a record; in a condition they are questions.
IN_A_CONDITION = re.compile(r"platform\.\w+|cpu_count|__version__|get_device_name")
ASKED = re.compile(r"^(os|sys|signal|socket|torch|torch\.\w+)$")


def conditions(tree: ast.AST):
    for node in ast.walk(tree):
        if isinstance(node, (ast.If, ast.IfExp, ast.While)):
            yield node.test
        elif isinstance(node, (ast.Compare, ast.BoolOp)):
            yield node


def questions(tree: ast.AST) -> list[str]:
    """What the code in a tree asks, as the table spells it."""
    found = {}  # a place in the file -> the question there
    for node in ast.walk(tree):
        text = ""
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            if CALLS.search(name):
                text = f"{name}()"
            elif name in ("hasattr", "getattr") and len(node.args) == 2 + (name == "getattr") \
                    and ASKED.match(ast.unparse(node.args[0])):
                text = f"{name}({ast.unparse(node.args[0])}, {ast.unparse(node.args[1])})"
        elif isinstance(node, ast.Attribute) and NAMES.match(ast.unparse(node)):
            text = ast.unparse(node)
        elif isinstance(node, ast.Constant) and re.match(r"/(proc|dev|sys|etc)/", str(node.value)):
            text = str(node.value)
        elif isinstance(node, ast.ExceptHandler) and node.type is not None:
            text = " ".join(re.findall("ImportError|ModuleNotFoundError", ast.unparse(node.type)))
        elif isinstance(node, ast.ImportFrom) and node.module in ("sys", "os", "platform"):
            text = " ".join(alias.name for alias in node.names
                            if node.module == "platform" or alias.name in ("platform", "name"))
        if text:
            found[node.lineno, node.col_offset, text] = text
    for condition in conditions(tree):
        for node in ast.walk(condition):
            if isinstance(node, ast.Attribute) and IN_A_CONDITION.search(ast.unparse(node)):
                if ast.unparse(node) != "sys.platform":
                    found[node.lineno, node.col_offset, "in"] = ast.unparse(node)
    return list(found.values())


def asked() -> Counter:
    """(file, function or class, question) of the whole project -> how often."""
    found = Counter()
    for path in (path for folder in FOLDERS for path in (ROOT / folder).glob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for part in tree.body:
            where = getattr(part, "name", "")  # "" for what stands outside of all
            found.update((path.relative_to(ROOT).as_posix(), where, question)
                         for question in questions(part))
    return found


def table() -> dict[tuple, list[str]]:
    """(file, function or class, question) in README.md -> the tests that force its answers."""
    text = (ROOT / "tests" / "README.md").read_text(encoding="utf-8")
    section = text.split("## Questions about the machine")[1].split("\n## ")[0]
    rows = re.findall(r"^\| `(.+?)` \| (.+?) \| `(.+?)` \| (.+?) \|$", section, re.MULTILINE)
    return {(file, "" if where == "-" else where.strip("`"), question):
            re.findall("`(.+?)`", tests) for file, where, question, tests in rows}


def test_each_question_about_the_machine_is_in_the_table():
    told = Counter()
    for (file, where, question), tests in table().items():
        question, _, times = question.partition(" ×")
        told[file, where, question] = int(times or 1)
        assert tests, "test_readme.py asks whether they exist"
    assert told == asked()


@pytest.mark.parametrize("code", [
    "if sys.platform == 'win32': pass", "x = torch.cuda.is_available()", "open('/proc/cpuinfo')",
    "if 'AMD' in platform.processor(): pass", "f = getattr(os, 'fork', None)",
    "try:\n    import fcntl\nexcept (ImportError, OSError):\n    pass", "from os import name",
    "y = 1 if torch.__version__ < '2.9' else 2", "hasattr(torch, 'compile')",
    "torch.compiler.is_compiling()", "if 'H100' in torch.cuda.get_device_name(): pass"])
def test_a_new_question_is_found(code):
    assert questions(ast.parse(code))
    assert not questions(ast.parse("print(platform.machine(), torch.__version__)  # sys.platform"))


# ------------------------------------------------------------------------------------------------
# batches

@pytest.fixture
def small(tmp_path):
    return datasets.open_images(str(folder_of(tmp_path / "set", 12)))


def test_workers_are_forked_on_linux_and_spawned_elsewhere(small, monkeypatch):
    for system, way in (("linux", "fork"), ("win32", "spawn"), ("darwin", "spawn")):
        monkeypatch.setattr(sys, "platform", system)
        assert batches.way_to_start_workers() == way
    alone = take(ImageStream(small, 8, 4, seed=0), 2)
    assert same(alone, take(ImageStream(small, 8, 4, seed=0, workers=1), 2))


@pytest.mark.parametrize("gpu", [True, False])
def test_batches_are_pinned_where_there_is_a_gpu(small, monkeypatch, gpu):
    Loader, asked = torch.utils.data.DataLoader, []

    def loader(*args, pin_memory, **more):  # pinning itself takes a GPU
        asked.append(pin_memory)
        return Loader(*args, **more)
    alone = take(ImageStream(small, 8, 4, seed=0), 2)
    monkeypatch.setattr(torch.utils.data, "DataLoader", loader)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    assert same(alone, take(ImageStream(small, 8, 4, seed=0), 2)) and asked == [gpu]


def worker(way: str) -> None:
    """Ends with 0 if the parent's signal ends it, 7 if it goes on, 8 if it ignores Ctrl-C."""
    senders = iter((1, multiprocessing.parent_process().pid))  # a stranger, then the parent
    if way == "sigwaitinfo":
        signal.sigwaitinfo = lambda numbers: SimpleNamespace(si_pid=next(senders))
    elif hasattr(signal, "sigwaitinfo"):
        del signal.sigwaitinfo
    if way == "nothing":
        del signal.pthread_sigmask
    batches.obey_only_the_parent(0)
    time.sleep(0.5)
    os._exit(8 if signal.getsignal(signal.SIGINT) == signal.SIG_IGN else 7)


@pytest.mark.parametrize("way, code", [("sigwaitinfo", 0), ("pthread_sigmask", 7), ("nothing", 8)])
def test_a_worker_obeys_its_parent_as_far_as_the_system_lets_it(way, code):
    process = multiprocessing.get_context("fork").Process(target=worker, args=(way,))
    process.start()
    process.join(30)
    assert process.exitcode == code


def test_a_workers_death_is_heard_while_a_batch_is_waited_for_and_at_no_other_moment(small):
    before, others = signal.getsignal(signal.SIGCHLD), multiprocessing.active_children()
    stream = iter(ImageStream(small, 8, 4, seed=0, workers=1))
    next(stream)
    assert signal.getsignal(signal.SIGCHLD) == before
    worker, = (child for child in multiprocessing.active_children() if child not in others)
    worker.kill()
    worker.join()  # nothing is raised here
    refused(lambda: stream, names=["a data worker died"])


@pytest.mark.parametrize("there", [True, False])
def test_shared_memory_is_measured_where_it_is_a_folder(tmp_path, monkeypatch, there):
    monkeypatch.setattr(batches, "SHARED", str(tmp_path if there else tmp_path / "none"))
    if there:
        refused(batches.need_shared_memory, 2, 10 ** 18, names=[str(tmp_path), "--workers 0"])
    else:
        batches.need_shared_memory(2, 10 ** 18)
    batches.need_shared_memory(2, 1)


# ------------------------------------------------------------------------------------------------
# checkpoints

@pytest.mark.parametrize("cuda, mps", [(False, False), (True, False), (False, True)])
def test_a_gpus_random_state_is_kept_and_restored_where_there_is_one(monkeypatch, cuda, mps):
    put = {}
    for name, module, backend, there in (("cuda", torch.cuda, torch.cuda, cuda),
                                         ("mps", torch.mps, torch.backends.mps, mps)):
        monkeypatch.setattr(backend, "is_available", lambda there=there: there)
        monkeypatch.setattr(module, "get_rng_state", lambda name=name: torch.tensor([len(name)]))
        monkeypatch.setattr(module, "set_rng_state",
                            lambda state, name=name: put.update({name: state}))
    state = checkpoint.random_state()
    wanted = {"cpu", *["cuda"] * cuda, *["mps"] * mps}
    assert set(state) == wanted
    before = torch.rand(3)
    # A state of all three, as from another machine: what is not here is passed over.
    checkpoint.set_random_state({"cuda": torch.tensor([4]), "mps": torch.tensor([3]), **state})
    assert torch.equal(torch.rand(3), before) and set(put) == wanted - {"cpu"}


@pytest.mark.parametrize("system, left", [("linux", 1), ("win32", 0)])
def test_leftovers_of_a_living_process_stay_but_on_windows(tmp_path, monkeypatch, system, left):
    (tmp_path / f".x.tmp-{os.getppid()}").touch()
    monkeypatch.setattr(sys, "platform", system)
    checkpoint.sweep(tmp_path)
    assert len(names(tmp_path)) == left


# ------------------------------------------------------------------------------------------------
# processes

@pytest.mark.parametrize("wanted, cuda, mps, device", [
    ("auto", True, True, "cuda:0"), ("auto", False, True, "cpu"), ("cpu", True, True, "cpu"),
    ("cuda", True, False, "cuda:0"), ("cuda", False, False, "no CUDA device"),
    ("mps", False, True, "mps"), ("mps", True, False, "no Apple GPU")])
def test_the_device_is_the_one_that_is_there(monkeypatch, wanted, cuda, mps, device):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    precision = torch.get_float32_matmul_precision()
    try:
        if device.startswith("no"):
            refused(Processes, wanted, names=[device, "--device cpu"])
        else:
            assert str(Processes(wanted).device) == device
    finally:
        torch.set_float32_matmul_precision(precision)


@pytest.mark.parametrize("device, has_it, wanted", [
    ("cuda", True, "bf16"), ("cuda", False, "fp32"), ("cpu", True, "fp32")])
def test_bf16_is_chosen_where_the_gpu_has_it(monkeypatch, device, has_it, wanted):
    procs = Processes("cpu")
    procs.device = torch.device(device)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: has_it)
    assert procs.precision("auto") == wanted
    assert (procs.precision("fp32"), procs.precision("bf16")) == ("fp32", "bf16")


@pytest.mark.parametrize("library, kept", [("glibc", 2), ("another", 0), ("none", 0)])
def test_freed_memory_is_kept_where_the_library_can(monkeypatch, library, kept):
    said = []

    def load(name):
        if library == "none":  # as on Windows
            raise TypeError("expected str, bytes or os.PathLike object, not NoneType")
        found = SimpleNamespace()
        if library == "glibc":
            found.mallopt = lambda *what: said.append(what)
        return found
    monkeypatch.setattr(processes.ctypes, "CDLL", load)
    processes.keep_memory()
    assert len(said) == kept


def test_peak_memory_is_read_where_the_system_writes_it(tmp_path, monkeypatch):
    cpu = torch.device("cpu")
    monkeypatch.setattr(processes, "SELF", str(tmp_path))
    (tmp_path / "status").write_text("VmPeak:\t 9 kB\nVmHWM:\t    123 kB\n")
    assert processes.peak_memory(cpu) == 123 * 1024
    processes.reset_peak_memory(cpu)
    assert (tmp_path / "clear_refs").read_text() == "5"
    monkeypatch.setattr(processes, "SELF", str(tmp_path / "none"))
    processes.reset_peak_memory(cpu)  # says nothing
    for system, known in (("darwin", True), ("win32", False)):
        monkeypatch.setattr(sys, "platform", system)
        assert (processes.peak_memory(cpu) > 0) == known


@pytest.mark.parametrize("git, commit", [(True, "0123abc+changes"), (False, "unknown")])
def test_the_commit_is_told_where_there_is_git(tmp_path, monkeypatch, git, commit):
    if git:
        program = tmp_path / "git"
        program.write_text("#!/bin/sh\ncase $3 in rev-parse) echo 0123abc;; *) echo M x;; esac\n")
        program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert processes.provenance("", torch.device("cpu"))["commit"] == commit


# ------------------------------------------------------------------------------------------------
# libraries

@pytest.mark.parametrize("knows", [True, False])
def test_formats_are_those_that_the_installed_pillow_reads(monkeypatch, knows):
    if knows:
        monkeypatch.setitem(Image.OPEN, "QOI", Image.OPEN["PNG"])
    else:
        monkeypatch.delitem(Image.OPEN, "QOI", raising=False)
    spec = importlib.util.spec_from_file_location("another", ROOT / "plumbing" / "images.py")
    images = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(images)
    assert ("QOI" in images.FORMATS) == knows
    assert images.decode(PNG, "x").shape == (4, 6, 3)
