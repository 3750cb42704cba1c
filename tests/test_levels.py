"""The house: plumbing <- method <- evaluation <- entries <- experiments. A file imports only from the left,
and within a folder only from lower levels, so the project can be read from the bottom up."""
import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

LEVELS = (
    {"plumbing.flags"},
    {"plumbing.checkpoint", "plumbing.processes"},
    {"plumbing.images", "plumbing.plot"},
    {"plumbing.shapes", "plumbing.page"},
    {"plumbing.datasets"},
    {"plumbing.batches", "plumbing.run"},
    {"plumbing.tokens"},
    {"config", "layers"},
    {"losses", "quantizer"},
    {"mit", "mocet", "decoder", "titok", "generator"},
    {"nativetok", "loop"},
    {"evaluation.inception", "evaluation.measures", "evaluation.tinycnn"},
    {"evaluation.judging"},
    {"train", "sample", "eval_fid", "explain"},
    {"experiments.timing"},
    {"experiments.bench", "experiments.order_table", "experiments.pca", "experiments.photos"},
    {"experiments.order", "experiments.record", "experiments.scaling"},
    {"experiments.trials"},
)
LEVEL = {name: number for number, names in enumerate(LEVELS) for name in names}
PATHS = [*ROOT.glob("*.py"), *(path for folder in ("plumbing", "evaluation", "experiments") for path in (ROOT / folder).glob("*.py"))]
FILES = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in sorted(PATHS)}


def imported(name: str) -> set[str]:
    """The modules that a file of the project imports anywhere in it, also inside its functions."""
    found = set()
    for node in ast.walk(ast.parse(FILES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} has a relative import, and this is no package"
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_every_file_has_a_level():
    assert FILES and set(FILES) <= set(LEVEL), "a new file needs a place in LEVELS"


def test_no_file_in_a_folder_shares_a_name_with_one_in_the_root():
    stems = [name.rpartition(".")[2] for name in FILES]
    assert len(stems) == len(set(stems)), "python FOLDER/FILE.py would then import the wrong one"


@pytest.mark.parametrize("name", FILES)
def test_a_file_imports_only_from_lower_levels(name):
    wrong = [other for other in imported(name) & set(FILES) if LEVEL[other] >= LEVEL[name]]
    assert not wrong, f"{name} is on level {LEVEL[name]} and imports {', '.join(wrong)}"


def test_no_file_is_longer_than_400_lines():
    files = [*FILES.values(), *ROOT.glob("tests/**/*.py")]
    long = {str(path.relative_to(ROOT)): lines for path in files if (lines := len(path.read_text(encoding="utf-8").splitlines())) > 400}
    assert files and not long, long


def test_flags_need_only_the_standard_library():
    assert {name.split(".")[0] for name in imported("plumbing.flags")} <= set(sys.stdlib_module_names)


def test_the_generator_knows_nothing_of_pixels():
    assert imported("generator").isdisjoint({"mit", "decoder", "titok", "nativetok", "plumbing.images", "plumbing.datasets", "losses"})
