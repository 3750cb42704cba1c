"""The tables of d2it/README.md, made of result files and put where they belong.

In       results/demo-d2it.json, demo-d2it-fine.json   of the runs of make demo-d2it, by record.py
         results/grain-tiny/, grain-cifar-cpu/         OUT of grain.py, without runs/
Run      python -m experiments.grain_page      after results have changed
Makes    what stands between the marks of d2it/README.md; what no file holds is "not run"
"""
import statistics
from pathlib import Path

from experiments.grain_arms import CODES, IMAGES
from experiments.grain_table import rows_of
from experiments.order_table import cell, line_of, read_results
from plumbing import checkpoint
from plumbing.flags import need

HOME = Path(__file__).parent
PAGE, RESULTS = HOME.parent / "d2it" / "README.md", HOME / "results"
# Only these rows; all arms and columns are in the tables beside the results.
CODES_SHOWN = ("coarse", "coarse10", "entropy", "static", "random", "error", "fine2", "fine3",
               "fine")
IMAGES_SHOWN = ("dit-fine", "dit-coarse10", "d2it-6+0", "d2it-4+2", "d2it-4+2, true maps",
                "d2it-4+2, random maps")
SETS = {"shapes": "grain-tiny", "CIFAR-10": "grain-cifar-cpu"}
MISSING = "not run"


# ------------------------------------------------------------------------------------------------
# the experiment

def found(folder: Path) -> dict[str, list[dict]]:
    """{name of a row: its columns, by seed} of one data set; empty when nothing has been run."""
    if not list(folder.glob("*-[0-9]*.json")):
        return {}
    return rows_of(read_results(str(folder), [*CODES, *IMAGES]))


def shown(values: list[float], digits: str) -> str:
    """Mean ± deviation; whole numbers, which hardly differ between seeds, without it."""
    return format(statistics.mean(values), digits) if digits == ".0f" else cell(values, digits)


def table(names: tuple[str, ...], first: str, columns: dict[str, str],
          results: Path) -> list[str]:
    """A row for each name; for each data set the columns of grain_table, with so many digits."""
    sets = {title: found(results / folder) for title, folder in SETS.items()}
    heads = [f"{column}, {title}" for title in sets for column in columns]
    lines = [line_of([first, *heads]), "|---" * (1 + len(heads)) + "|"]
    for name in names:
        cells = [shown([row[column] for row in of_set[name]], digits) if name in of_set else MISSING
                 for of_set in sets.values() for column, digits in columns.items()]
        lines.append(line_of([name, *cells]))
    return lines


def codes(results: Path) -> list[str]:
    return table(CODES_SHOWN, "codes of", {"numbers": ".0f", "PSNR, dB": ".2f"}, results)


def images(results: Path) -> list[str]:
    return table(IMAGES_SHOWN, "drawn by", {"FD": ".1f", "class seen": ".2f"}, results)


# ------------------------------------------------------------------------------------------------
# the demo

def demo(results: Path) -> list[str]:
    """What `make demo-d2it` came to."""
    made, all_fine = (checkpoint.read_json(path) if path.exists() else None
                      for path in (results / "demo-d2it.json", results / "demo-d2it-fine.json"))

    def phase(record, name: str) -> dict:
        (row,) = [row for row in record["phases"] if row["phase"] == name]
        return row
    told = {name: MISSING for name in (
        "codes an image, of 16 to 64", "PSNR of held-out images", "the same, all cells fine",
        "bits of a map, of 16", "class seen", "maps obeyed", "minutes of training")}
    if made and all_fine:
        dvae, samples = phase(made, "dvae"), made["samples"]
        judged = made["evaluation"]["rows"][0]
        seconds = sum(row["seconds"] for record in (made, all_fine) for row in record["phases"])
        told = dict(zip(told, (
            f"{dvae['codes']:.1f}",
            f"{dvae['psnr']:.2f} dB: {dvae['psnr_coarse_cells']:.1f} in coarse cells, "
            f"{dvae['psnr_fine_cells']:.1f} in fine ones",
            f"{phase(all_fine, 'dvae')['psnr']:.2f} dB",
            f"{phase(made, 'grain')['bits_per_map']:.1f}",
            f"{judged['class_accuracy']:.1%} of {judged['n']}, guidance {samples['cfg_scale']:g}",
            f"{samples['maps_obeyed']:.1%}; the maps of their neighbours "
            f"{samples['maps_of_neighbours_obeyed']:.1%}",
            f"{seconds / 60:.1f}, the arm with all cells fine included")))
    return [line_of(("what", "seen")), "|---|---|", *map(line_of, told.items())]


# ------------------------------------------------------------------------------------------------

def filled(text: str, results: Path = RESULTS) -> str:
    """The page with its tables as the results have them."""
    for name, lines in (("demo", demo(results)), ("codes", codes(results)),
                        ("images", images(results))):
        begin, end = f"<!-- {name} -->\n", "<!-- end -->"
        parts = text.split(begin)
        need(len(parts) == 2 and end in parts[1], f"the page has no place for {name}; give it "
             f"{begin.strip()} and {end}")
        text = parts[0] + begin + "\n".join(lines) + "\n" + parts[1][parts[1].index(end):]
    return text


if __name__ == "__main__":
    page = PAGE.read_text(encoding="utf-8")
    with checkpoint.replacing(PAGE) as file:
        file.write(filled(page).encode())
    print(f"{PAGE}: {filled(page).count(MISSING)} cells {MISSING}")
