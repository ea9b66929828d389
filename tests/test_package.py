"""The notebooks' demo and test cells again, on the exported package instead of the notebooks' own definitions.

A wrong export cannot hide behind what the notebook defined itself, and coverage counts the lines of anomdx/*.py."""
import builtins
import importlib
import re
import traceback

import pytest
from execnb.shell import CaptureShell
from nbdev.config import get_config
from nbdev.process import NBProcessor

from notebooks import NOTEBOOKS, name


def default_exp(path) -> str:
    "Name of the module that a notebook exports to; '' for one that only tells."
    found = re.search(r'#\|\s*default_exp\s+([\w.]+)', path.read_text(encoding="utf-8"))
    return found[1] if found else ""


def exported_names(code: str, module) -> dict:
    "What an exported cell would define or use, taken from the module: the notebook then goes on with the package's own objects."
    names = compile(code, "cell", "exec").co_names
    return {n: vars(module)[n] for n in names if n in vars(module) and not hasattr(builtins, n)}


@pytest.mark.parametrize("path", [p for p in NOTEBOOKS if default_exp(p)], ids=name)
def test_package(path, monkeypatch):
    monkeypatch.chdir(path.parent)
    monkeypatch.setenv("IN_TEST", "1")
    module = importlib.import_module(f"anomdx.{default_exp(path)}")
    flags, shell = set(get_config().tst_flags.split()), CaptureShell(path)
    for cell in NBProcessor(path, process=True).nb.cells:
        directives = getattr(cell, "directives_", None) or {}
        if cell.cell_type != "code" or flags & directives.keys() or directives.get("eval:", [""])[0].lower() == "false": continue
        if directives.keys() & {"export", "exporti", "exports"}:
            shell.user_ns.update(exported_names(cell.source, module))
            continue
        shell.run(cell.source)
        if shell.exc:
            where = "".join(traceback.format_exception(shell.exc))
            pytest.fail(f"{path.name}, cell {cell.idx_} ({cell.id}):\n\n{cell.source}\n\n{where}", pytrace=False)
