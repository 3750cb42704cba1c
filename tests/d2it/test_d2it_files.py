"""d2it/ is small enough to read, and nothing in it was copied from the rest of the project."""
import ast
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
OWN = sorted((ROOT / "d2it").glob("*.py"))
REST = sorted(path for folder in (".", "plumbing", "evaluation", "experiments")
              for path in (ROOT / folder).glob("*.py"))
RUN = 6  # lines


def lines_that_say_something(text: str) -> list[str]:
    """Without imports, which are alike because they have to be, and without lone brackets."""
    imports = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            imports |= set(range(node.lineno, node.end_lineno + 1))
    stripped = (line.strip() for number, line in enumerate(text.splitlines(), start=1)
                if number not in imports)
    return [line for line in stripped if line.strip("()[]{},")]


def runs(text: str) -> set[tuple[str, ...]]:
    lines = lines_that_say_something(text)
    return {tuple(lines[k:k + RUN]) for k in range(len(lines) - RUN + 1)}


def test_no_six_lines_of_d2it_stand_anywhere_else():
    text = "import os\n\nx = (\n    1,\n    2)\na = 1\nb = 2\nif a:\n    c = 3\n    d = 4\n"
    moved = text.replace("\n", "\n    ").replace("import os", "if True:\n    import sys")
    assert runs(text) & runs(moved) and not runs(text) & runs(moved.replace("b = 2", "b = 3"))
    own = {path: runs(path.read_text(encoding="utf-8")) for path in OWN}
    rest = {path: runs(path.read_text(encoding="utf-8")) for path in REST}
    assert len(OWN) > 8 and len(REST) > 40
    shared = [(path.name, other.name, *sorted(own[path] & rest[other])[0])
              for path in OWN for other in REST if own[path] & rest[other]]
    assert not shared
