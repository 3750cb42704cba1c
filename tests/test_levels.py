"""The promise of the file table: a file imports only from lower levels, so the project can be read from the bottom up."""
import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

LEVELS = (
    {"config"},
    {"checkpoint", "layers", "losses", "quantizer", "inception", "measures", "processes"},
    {"mit", "mocet", "decoder", "titok", "generator", "images"},
    {"nativetok", "shapes"},
    {"data", "runs"},
    {"batches"},
    {"tokens", "loop", "tinycnn"},
    {"judging"},
    {"train", "sample", "eval_fid", "explain"},
    {"bench"},
)
LEVEL = {name: number for number, names in enumerate(LEVELS) for name in names}
FILES = sorted(path.stem for path in ROOT.glob("*.py"))


def imported(name: str) -> set[str]:
    """The modules that a file of the project imports anywhere in it, also inside its functions."""
    found = set()
    for node in ast.walk(ast.parse((ROOT / f"{name}.py").read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}.py has a relative import, and this is no package"
            found.add(node.module.split(".")[0])
    return found


def test_every_file_has_a_level():
    assert FILES and set(FILES) <= set(LEVEL), "a new file needs a place in LEVELS"


@pytest.mark.parametrize("name", FILES)
def test_a_file_imports_only_from_lower_levels(name):
    wrong = [other for other in imported(name) & set(FILES) if LEVEL[other] >= LEVEL[name]]
    assert not wrong, f"{name}.py is on level {LEVEL[name]} and imports {', '.join(wrong)}"


def test_no_file_is_longer_than_400_lines():
    files = [*ROOT.glob("*.py"), *ROOT.glob("tests/*.py"), *ROOT.glob("experiments/*.py")]
    long = {str(path.relative_to(ROOT)): lines for path in files if (lines := len(path.read_text(encoding="utf-8").splitlines())) > 400}
    assert files and not long, long


def test_config_needs_only_the_standard_library():
    """So that --help and a wrong flag are answered before torch is loaded."""
    assert imported("config") <= set(sys.stdlib_module_names)


def test_the_generator_knows_nothing_of_pixels():
    assert imported("generator").isdisjoint({"mit", "decoder", "titok", "nativetok", "images", "data", "losses"})
