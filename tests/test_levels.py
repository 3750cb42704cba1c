"""The house: plumbing <- method <- evaluation <- entries <- experiments, d2it beside the entries.

A file imports only from the left, and nothing imports in a circle: read it from the bottom up.
"""
import ast
import functools
import graphlib
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
FOLDERS = ("plumbing", "evaluation", "d2it", "experiments")
ENTRIES = {"train", "sample", "eval_fid", "explain"}
PATHS = [*ROOT.glob("*.py"), *(path for folder in FOLDERS for path in (ROOT / folder).glob("*.py"))]
FILES = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in sorted(PATHS)}
MAY_IMPORT = {
    "plumbing": {"plumbing"},
    "method": {"plumbing", "method"},
    "evaluation": {"plumbing", "method", "evaluation"},
    "d2it": {"plumbing", "method", "evaluation", "d2it"},
    "entries": {"plumbing", "method", "evaluation"},
    "experiments": {"plumbing", "method", "evaluation", "d2it", "entries", "experiments"},
}


def level(name: str) -> str:
    folder = name.rpartition(".")[0]
    return folder or ("entries" if name in ENTRIES else "method")


@functools.cache
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


def test_a_file_imports_only_from_the_left():
    wrong = [f"{name} belongs to {level(name)} and imports {other}"
             for name in FILES for other in imported(name) & set(FILES)
             if level(other) not in MAY_IMPORT[level(name)]]
    assert not wrong


def test_nothing_imports_in_a_circle():
    graph = {name: imported(name) & set(FILES) for name in FILES}
    order = list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError
    assert order.index("plumbing.flags") < order.index("config") < order.index("train")


def test_no_folder_holds_a_file_of_the_same_name_as_the_root():
    root = {name for name in FILES if "." not in name}
    # d2it is run by -m only, where a file of its folder hides none of the root.
    others = {name.rpartition(".")[2] for name in set(FILES) - root if level(name) != "d2it"}
    assert not root & others


def test_flags_need_only_the_standard_library_and_the_generator_knows_nothing_of_pixels():
    assert {name.split(".")[0] for name in imported("plumbing.flags")} <= sys.stdlib_module_names
    pixels = {"mit", "decoder", "titok", "nativetok", "losses", "plumbing.images",
              "plumbing.datasets"}
    assert imported("generator").isdisjoint(pixels)
