"""d2it/README.md says what is true: its tables are those of the result files, its links lead
somewhere, its code is in its file. Its commands: test_commands.py."""
import json
import re

from experiments import grain_page
from experiments.grain_arms import CODES, IMAGES
from helpers import refused

PAGE = grain_page.PAGE.read_text(encoding="utf-8")


def test_tables_of_the_page_are_those_of_the_result_files():
    right = grain_page.filled(PAGE)
    assert PAGE == right, "python -m experiments.grain_page puts them there"


def written(folder, name: str, content: dict) -> None:
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(content))


def test_numbers_come_from_the_files_and_what_no_file_holds_is_not_run(tmp_path):
    empty = grain_page.filled(PAGE, tmp_path)
    assert "| coarse10 | not run | not run | not run | not run |" in empty
    cost = {phase: {"seconds": 2.0, "steps": 10} for phase in ("dvae", "content")}
    shared = {"fd_tinycnn_x": 7.04, "costs": cost, "seed": 0}
    codes = {**shared, "codes": 40.0, "numbers": 159.6, "psnr": 31.206, "psnr_fine_cells": 28.0,
             "psnr_coarse_cells": 40.0, "reconstruction": {"class_accuracy": 0.97}}
    row = {"fd_tinycnn_x": 55.55, "class_accuracy": 0.871, "map_obeyed": 0.9, "ms_an_image": 1.0}
    images = {**shared, "loss": {}, "bits_of_a_map": 5.0, "tokens_times_blocks": 100.0,
              "samples": [{"name": "predicted", **row}, {"name": "random", **row}]}
    written(tmp_path / "grain-tiny", "entropy-0", codes)
    written(tmp_path / "grain-tiny", "d2it-4+2-0", images)
    for seed, dB in ((0, 20.0), (1, 22.0)):
        written(tmp_path / "grain-cifar-cpu", f"entropy-{seed}", {**codes, "psnr": dB})
    page = grain_page.filled(PAGE, tmp_path)
    assert "| entropy | 160 | 31.21 | 160 | 21.00 ± 1.4 |" in page
    assert "| d2it-4+2, random maps | 55.5 | 0.87 | not run | not run |" in page
    assert "| d2it-4+2, true maps | not run | not run | not run | not run |" in page
    assert page.split("<!-- demo -->")[0] == PAGE.split("<!-- demo -->")[0], "nothing else changes"

    def phase(name, **values):
        return {"phase": name, "seconds": 60.0, **values}
    dvae = phase("dvae", codes=39.62, psnr=31.0, psnr_coarse_cells=40.0, psnr_fine_cells=28.0)
    made = {"phases": [dvae, phase("grain", bits_per_map=5.06), phase("content", loss=0.1)],
            "evaluation": {"rows": [{"class_accuracy": 0.876, "n": 500}]},
            "samples": {"maps_obeyed": 0.93, "maps_of_neighbours_obeyed": 0.61, "cfg_scale": 3.0}}
    written(tmp_path, "demo-d2it", made)
    assert "| class seen | not run |" in grain_page.filled(PAGE, tmp_path), "both runs are needed"
    written(tmp_path, "demo-d2it-fine", {"phases": [phase("dvae", psnr=31.5)]})
    page = grain_page.filled(PAGE, tmp_path)
    for line in ("| codes an image, of 16 to 64 | 39.6 |",
                 "| the same, all cells fine | 31.50 dB |",
                 "| class seen | 87.6% of 500, guidance 3 |", "| bits of a map, of 16 | 5.1 |"):
        assert line in page
    assert "| minutes of training | 4.0," in page


def test_a_page_without_a_place_for_a_table_is_refused():
    refused(grain_page.filled, PAGE.replace("<!-- codes -->", ""), names=["codes", "place"])


def test_arms_that_the_page_shows_are_there():
    arms = {name.split(",")[0] for name in grain_page.IMAGES_SHOWN}
    assert set(grain_page.CODES_SHOWN) <= set(CODES) and arms <= set(IMAGES)


def test_links_lead_to_files_and_quoted_code_is_in_its_file():
    folder = grain_page.PAGE.parent
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", PAGE) if not link.startswith("http")]
    assert len(links) > 8 and all((folder / link).exists() for link in links)
    source = {line.strip() for line in (folder / "diffusion.py").read_text().splitlines()}
    (block,) = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    assert set(block.splitlines()) <= source
    for row in re.findall(r"^\| \[(\w+\.py)\]\(\1\) \| [^|]+ \| ([^|]+) \|$", PAGE, flags=re.M):
        text = (folder / row[0]).read_text()
        for name in re.findall(r"`([^`]+)`", row[1]):
            last = name.split(".")[-1].replace("()", "(")
            assert last in text, f"{row[0]} has no {name}"
