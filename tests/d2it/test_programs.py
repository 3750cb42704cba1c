"""All programs of both systems: one guard for places, empty values and processes."""
import importlib
import re
import shutil

import numpy as np
import pytest

from helpers import ROOT
from plumbing.flags import UserError

# {module: words that would start its work}, {flag that writes: is it a folder?}
RUN, D2IT = ["--run", "RUN"], ["--run", "D2IT"]
PROGRAMS = {
    "sample": [(RUN, "--npz"), (RUN, "--out")],
    "explain": [(RUN, "--out")],
    "eval_fid": [(RUN, "--json"), (["--data", "DATA", "--features", "inception"], "--save_stats")],
    "d2it.sample": [(D2IT, "--npz"), ([*D2IT, "--npz", "x.npz"], "--json"), (D2IT, "--out")],
    "d2it.explain": [(D2IT, "--out")],
    "experiments.search": [(RUN, "--json")],
    "experiments.rate": [([*RUN, "--bits_a_db", "1e9"], "--json")],
    "experiments.bench": [([], "--json")],
    "experiments.order": [([], "--out")],
    "experiments.grain": [([], "--out")],
    "experiments.record": [([*RUN, "--by", "me"], "--out")],
    "experiments.flow": [([*RUN, "--judge", "judge.pt"], "--out"), (RUN, "--pictures")],
    "experiments.judge": [(["--data", "DATA", "--val_data", "DATA"], "--out")],
    "experiments.moving": [(RUN, "--out")],
    "experiments.tour": [([], "--out")],
    "experiments.speedrun": [(["--data", "DATA", "--val_data", "DATA"], "--out")],
}
CASES = [(program, words, flag) for program, uses in PROGRAMS.items() for words, flag in uses]
FILES = ("experiments.record", "experiments.flow", "experiments.judge", "experiments.moving",
         "experiments.tour")  # where --out is one
WORK = ("sample.draw_samples", "d2it.sample.draw_samples", "plumbing.page.Page.grid",
        "eval_fid.judge", "eval_fid.extract", "experiments.search.search",
        "experiments.rate.learn_on",
        "experiments.bench.Bench.seconds", "train.main",
        "d2it.train.main", "experiments.record.phases",
        "d2it.train.train_dvae", "experiments.flow.tinycnn_nets", "experiments.judge.learn",
        "experiments.flow.draw_pictures")


def started(monkeypatch, program: str, words: list[str]) -> None:
    """The program's main, in this process, as its command line would call it."""
    module = importlib.import_module(program)
    monkeypatch.setattr("sys.argv", [program, *words])
    asks = module.main.__code__.co_argcount and "argv" not in module.main.__code__.co_varnames
    module.main(module.parse()) if asks else module.main()


@pytest.fixture
def here(small_run, finished, data, tmp_path, monkeypatch):
    """Where the programs run, and nothing of their work can be done."""
    monkeypatch.chdir(tmp_path)
    places = {"RUN": shutil.copytree(small_run, tmp_path / "run"),
              "D2IT": shutil.copytree(finished, tmp_path / "d2it"), "DATA": data}

    def forbidden(*_, **__):
        raise AssertionError("work has begun")
    for name in WORK:
        monkeypatch.setattr(name, forbidden)
    return lambda words: [str(places.get(word, word)) for word in words]


@pytest.mark.parametrize("program, words, flag", CASES)
def test_every_program_looks_at_its_places_before_it_works(program, words, flag, here, tmp_path,
                                                           monkeypatch):
    (tmp_path / "file").write_text("in the way")
    folder = flag == "--out" and program not in FILES or flag == "--pictures"
    wrong = ["file/x"] if folder else [".", "none/x", "file/x"]
    for value in (*wrong, ""):
        with pytest.raises(UserError) as caught:
            started(monkeypatch, program, [*here(words), flag, value])
        message = str(caught.value)
        assert (value or flag) in message and "\n" not in message
    assert not (tmp_path / "none").exists() and (tmp_path / "file").read_text() == "in the way"


def test_the_list_of_programs_is_whole():
    """Who writes a file or a folder by a flag stands above."""
    found = set()
    for folder in ("", "d2it/", "experiments/"):
        for path in ROOT.glob(f"{folder}*.py"):
            text = path.read_text(encoding="utf-8")
            own = "Parser(" in text and re.search('"--(out|json|npz|save_stats)"', text)
            # made elsewhere, --out among them: the flags of order.py, those of samples.py
            if own or "parser_of(" in text or "sample_parser(" in text:
                found.add(f"{folder}{path.stem}".replace("/", "."))
    assert found == set(PROGRAMS)


def test_one_file_for_two_outputs_and_an_output_that_is_read(here, tmp_path, monkeypatch):
    np.savez(tmp_path / "seen.npz", arr_0=np.zeros((3, 32, 32, 3), np.uint8))
    for program, words in (
            ("d2it.sample", [*D2IT, "--npz", "x", "--json", "./x"]),
            ("eval_fid", [*RUN, "--json", "x", "--save_stats", "x"]),
            ("d2it.sample", [*D2IT, "--grain", "seen.npz", "--npz", "seen.npz"]),
            ("eval_fid", ["--features", "inception", "--images", "seen.npz", "--data", "DATA",
                          "--save_stats", "seen.npz"])):
        with pytest.raises(UserError, match="same file|there already"):
            started(monkeypatch, program, here(words))


SHARED = ("eval_fid",)  # several processes may work at it


@pytest.mark.parametrize("program", [name for name in PROGRAMS if name not in SHARED])
def test_a_program_of_one_process_refuses_several(program, here, monkeypatch):
    for name, value in dict(RANK="0", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1",
                            MASTER_PORT="29500").items():
        monkeypatch.setenv(name, value)
    words, flag = PROGRAMS[program][-1]
    words = [*words, flag, "x"] if program in FILES else words
    with pytest.raises(UserError, match=f"{program}.* works in one process.*without torchrun"):
        started(monkeypatch, program, here(words))
