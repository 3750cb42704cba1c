"""tour.ipynb runs from top to bottom, and what it shows is what it computes."""
import json
import re

import pytest
import torch

from experiments.tour import FEW, NOTEBOOK, execute
from helpers import ROOT

TOLERANCE = 0.5  # dB: other machines round in other ways, and training makes that larger


@pytest.fixture
def cells(monkeypatch):
    monkeypatch.chdir(ROOT)
    return json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]


def code(cells):
    return [cell for cell in cells if cell["cell_type"] == "code"]


def printed(cells) -> str:
    return "".join(line for cell in code(cells) for output in cell["outputs"]
                   for line in output.get("text", ()))


def figures(cells) -> dict[str, list[float]]:
    """{what: dB}, of lines like "4 tokens: 20.1 dB"; some are printed twice."""
    found = {}
    for what, db in re.findall(r"^(.+): (-?\d+\.\d) dB$", printed(cells), flags=re.M):
        found.setdefault(what, []).append(float(db))
    return found


def pictures(cells) -> int:
    return sum("image/png" in output.get("data", {}) for cell in code(cells)
               for output in cell["outputs"])


def test_its_cells_run_in_order_and_print_what_the_stored_ones_do(cells):
    stored, before = json.loads(json.dumps(cells)), torch.random.get_rng_state()
    execute(cells, **FEW)
    torch.random.set_rng_state(before)
    assert figures(cells).keys() == figures(stored).keys() and pictures(cells) == pictures(stored)
    assert "the old ids are the same: True" in printed(cells)


def test_every_code_cell_is_explained_and_has_its_output_stored(cells):
    for before, cell in zip(cells, cells[1:]):
        if cell["cell_type"] == "code":
            assert before["cell_type"] == "markdown"
    assert all(cell["execution_count"] == n for n, cell in enumerate(code(cells), start=1))
    assert len(figures(cells)) >= 7 and pictures(cells) >= 6
    assert "the old ids are the same: True" in printed(cells)


@pytest.mark.faults
def test_stored_figures_are_what_the_cells_compute(cells):
    stored = figures(cells)
    execute(cells)
    for what, values in figures(cells).items():
        assert values == pytest.approx(stored[what], abs=TOLERANCE), what
