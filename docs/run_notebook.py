"""Runs a notebook's code cells, one after the other, and keeps what they show: text, and figures as PNG.

    cd $(mktemp -d) && .../.venv/bin/python .../docs/run_notebook.py .../docs/notebook.ipynb

The notebook is written again with its outputs. They are made in the working directory, which should be an empty one.
"""

import ast
import base64
import contextlib
import io
import json
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")
from matplotlib import pyplot


def run(notebook: dict[str, Any]) -> None:
    """Run the cells in place; the first error ends it."""
    names: dict[str, Any] = {"__name__": "__main__"}
    count = 0
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            count += 1
            cell["execution_count"] = count
            cell["outputs"] = _outputs("".join(cell["source"]), names, count)


def _outputs(source: str, names: dict[str, Any], count: int) -> list[dict[str, Any]]:
    """What a cell prints, the value of its last expression, and its figures."""
    body = ast.parse(source)
    last = ast.Expression(body.body.pop().value) if isinstance(body.body[-1], ast.Expr) else None  # type: ignore[attr-defined]
    value = None
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(compile(body, f"cell {count}", "exec"), names)  # noqa: S102 - a notebook of this repository
        if last is not None:
            value = eval(compile(last, f"cell {count}", "eval"), names)  # noqa: S307 - the same
    outputs: list[dict[str, Any]] = []
    if printed.getvalue():
        outputs.append({"output_type": "stream", "name": "stdout", "text": printed.getvalue().splitlines(True)})
    for number in pyplot.get_fignums():
        buffer = io.BytesIO()
        pyplot.figure(number).savefig(buffer, format="png", dpi=60, metadata={"Software": None})
        outputs.append(_data("display_data", {"image/png": base64.b64encode(buffer.getvalue()).decode()}))
    pyplot.close("all")
    if value is not None:
        outputs.append(_data("execute_result", {"text/plain": [repr(value)]}) | {"execution_count": count})
    return outputs


def _data(kind: str, data: dict[str, Any]) -> dict[str, Any]:
    return {"output_type": kind, "data": data, "metadata": {}}


if __name__ == "__main__":
    path = Path(sys.argv[1])
    content = json.loads(path.read_text(encoding="utf-8"))
    run(content)
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
