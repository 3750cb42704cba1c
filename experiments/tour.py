"""Executes tour.ipynb from top to bottom and stores what its cells print and show.

Run       python -m experiments.tour --out tour.ipynb          (a minute or two, without Jupyter)
          python -m experiments.tour --out x.ipynb --quick     (does it run?)
Makes     the notebook again, with outputs
"""
import argparse
import ast
import base64
import contextlib
import io
import json
import os
from pathlib import Path

from PIL import Image

from plumbing.flags import Parser
from plumbing.outputs import need_places
from plumbing.processes import need_one_process
from plumbing.start import main_with_user_errors

NOTEBOOK = Path(__file__).parent.parent / "tour.ipynb"
FEW = dict(BASE_STEPS=3, GROW_STEPS=2, FINETUNE_STEPS=2, GENERATOR_STEPS=2, BATCH=8, HELD_OUT=16)


def execute(cells: list[dict], **constants: int) -> None:
    """Run the code cells in order, in one namespace, and put their outputs into them.

    constants   what replaces names that the first code cell defines, such as BASE_STEPS
    """
    namespace = {"__name__": "__main__"}
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    for number, cell in enumerate(code, start=1):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            shown = run(f"cell {number}", "".join(cell["source"]), namespace)
        cell["execution_count"] = number
        cell["outputs"] = outputs(number, printed.getvalue(), shown)
        if number == 1:
            assert constants.keys() <= namespace.keys(), f"not in the first cell: {constants}"
            namespace.update(constants)


def run(name: str, source: str, namespace: dict):
    """-> the value of the last line if that is an expression, as Jupyter shows it, or None."""
    *body, last = ast.parse(source).body
    if not isinstance(last, ast.Expr):
        exec(compile(source, name, "exec"), namespace)
        return None
    exec(compile(ast.Module(body, []), name, "exec"), namespace)
    return eval(compile(ast.Expression(last.value), name, "eval"), namespace)


def outputs(number: int, printed: str, shown) -> list[dict]:
    """In the notebook's format, version 4."""
    made = []
    if printed:
        made.append({"output_type": "stream", "name": "stdout", "text": printed.splitlines(True)})
    if isinstance(shown, Image.Image):
        file = io.BytesIO()
        shown.save(file, "PNG", optimize=True)
        data = {"image/png": base64.b64encode(file.getvalue()).decode(),
                "text/plain": ["<a picture>"]}
        made.append({"output_type": "execute_result", "execution_count": number, "metadata": {},
                     "data": data})
    return made


def main(args) -> None:
    need_one_process("experiments.tour")
    need_places({"--out": (args.out, (".ipynb", b"{"))})
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    out = Path(args.out).resolve()
    os.chdir(NOTEBOOK.parent)  # where its first cell finds the code
    execute(notebook["cells"], **(FEW if args.quick else {}))
    text = json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"
    out.write_text(text, encoding="utf-8")
    print(f"{args.out}: {len(notebook['cells'])} cells")


def parse(argv=None) -> argparse.Namespace:
    parser = Parser(prog="tour.py", description=__doc__)
    parser.add_argument("--out", required=True, metavar="FILE", help="the notebook with outputs")
    parser.add_argument("--quick", action="store_true", help="a few steps of everything")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main_with_user_errors(lambda: main(parse()))
