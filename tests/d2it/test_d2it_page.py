"""d2it/README.md says what is true: its numbers are those of the result files, what it names is in
its file. Links and quoted code: test_readme.py. Commands: test_commands.py."""
import json
import re
import statistics
from pathlib import Path

from experiments import grain, grain_table
from experiments.order_table import cell, line_of, read_results

ROOT = Path(__file__).parent.parent.parent
RESULTS = ROOT / "experiments" / "results"
PAGE = (ROOT / "d2it" / "README.md").read_text(encoding="utf-8")
SETS = {"shapes": "grain-tiny", "CIFAR-10": "grain-cifar-cpu"}
# Only these rows; all arms and columns are in the tables beside the results.
CODES = ("coarse", "static", "random", "error", "entropy", "coarse10", "fine2", "fine3", "fine")
IMAGES = ("dit-fine", "dit-coarse10", "d2it-6+0", "d2it-4+2", "d2it-4+2, true maps",
          "d2it-4+2, random maps", "d2it-3+3")


def results(name: str) -> dict[str, list[dict]]:
    return read_results(str(RESULTS / name), (*grain.ARMS, *grain.GONE))


def table(first: list[str], names: list[list[str]], title: str, columns: dict,
          sets: dict) -> list[str]:
    """names: the first cells of each row; for each set of images, columns of grain_table."""
    rows = {of: grain_table.rows_of(results(name))[title] for of, name in sets.items()}
    heads = [*first, *(f"{column}, {of}" for of in sets for column in columns)]
    lines = [line_of(heads), "|---" * len(heads) + "|"]
    for name, *more in names:
        cells = [cell([row[column] for row in of_set[name]], digits)
                 for of_set in rows.values() for column, digits in columns.items()]
        lines.append(line_of([name, *more, *cells]))
    return lines


def codes() -> list[str]:
    shapes, names = grain_table.rows_of(results("grain-tiny"))["Codes"], []
    for name in CODES:
        mean, numbers = (statistics.mean(row[head] for row in shapes[name])
                         for head in ("codes", "numbers"))
        names.append([name, f"{mean:.0f} × {numbers / mean:.0f}"])
    return table(["codes of", "codes × numbers"], names, "Codes", {"PSNR, dB": ".2f"}, SETS)


def images() -> list[str]:
    """Of the shapes alone: photographs need a judge that is right on more than 62% of them."""
    return table(["drawn by"], [[name] for name in IMAGES], "Images",
                 {"FD": ".1f", "class seen": ".2f"}, {"shapes": SETS["shapes"]})


def test_the_two_tables_of_results_are_those_of_the_result_files():
    for lines in (codes(), images()):
        right = "\n" + "\n".join(lines) + "\n\n"
        assert right in PAGE, f"the right table:\n{right}"
    for name in SETS.values():
        kept = (RESULTS / name / "table.md").read_text(encoding="utf-8")
        for lines in grain_table.summary(results(name)).values():
            assert "\n".join(lines) + "\n" in kept, "run python -m experiments.grain --table"


def test_what_is_said_of_the_demo_is_what_its_result_files_hold():
    made, fine = (json.loads((RESULTS / f"demo-d2it{name}.json").read_text())
                  for name in ("", "-fine"))
    phases = {phase["phase"]: phase for phase in made["phases"]}
    dvae, (all_fine,), samples = phases["dvae"], fine["phases"], made["samples"]
    judged, text = made["evaluation"]["rows"][0], PAGE.split("## Results")[1].split("|")[0]
    minutes = (sum(phase["seconds"] for phase in made["phases"]) + all_fine["seconds"]) / 60
    said = [f"{minutes:.1f} minutes", f"{dvae['codes']:.1f} codes", f"{dvae['psnr']:.2f} dB",
            f"{dvae['psnr_coarse_cells']:.1f} in coarse", f"{dvae['psnr_fine_cells']:.1f} in fine",
            f"{all_fine['psnr']:.2f} dB", f"{phases['grain']['bits_per_map']:.1f} bits",
            f"{judged['n']} samples at guidance {samples['cfg_scale']:g}",
            f"{judged['class_accuracy']:.1%} show", f"obeyed by {samples['maps_obeyed']:.1%}",
            f"would be by {samples['maps_of_neighbours_obeyed']:.1%}"]
    assert [words for words in said if words not in text] == []


def test_what_the_table_of_files_names_is_in_them():
    rows = re.findall(r"^\| \[\w+\.py\]\(([\w./]+)\) \| [^|]+ \| ([^|]+) \|$", PAGE, flags=re.M)
    assert len(rows) > 6
    for file, names in rows:
        text = (ROOT / "d2it" / file).read_text(encoding="utf-8")
        for name in re.findall(r"`([^`]+)`", names):
            last = name.split(".")[-1].replace("()", "(")
            assert last in text, f"{file} has no {name}"
