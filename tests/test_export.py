"""The package is what the notebooks export, and needs nothing of what they are written with."""
import ast
import configparser
import pkgutil
import shutil
import subprocess
import sys

import anomdx
from notebooks import ROOT

TOOLS = ["nbdev", "fastcore", "execnb", "IPython"]
MODULES = [f"anomdx.{m.name}" for m in pkgutil.iter_modules(anomdx.__path__) if m.name != "_modidx"]


def python(code: str) -> str:
    "What a new interpreter, started outside the repository, prints."
    done = subprocess.run([sys.executable, "-c", code], cwd="/", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def imports(tree: ast.AST) -> list[str]:
    "The packages that a piece of code imports, wherever in it."
    names = [a.name for node in ast.walk(tree) if isinstance(node, ast.Import) for a in node.names]
    names += [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    return [n.split(".")[0] for n in names]


def test_export_equals_package(tmp_path):
    "Export into an empty package: a module edited by hand, forgotten or left over from a deleted notebook shows here."
    shutil.copytree(ROOT/"nbs", tmp_path/"nbs", ignore=shutil.ignore_patterns("_quarto.yml"))
    for file in ("settings.ini", "pyproject.toml", "anomdx/__init__.py"):   # __init__ is written by hand, but for its version
        (tmp_path/file).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT/file, tmp_path/file)
    subprocess.run([sys.executable, "-c", "from nbdev.doclinks import nbdev_export; nbdev_export()"], cwd=tmp_path, check=True)
    exported, package = ({p.relative_to(root).as_posix(): p.read_text(encoding="utf-8") for p in (root/"anomdx").rglob("*.py")}
                         for root in (tmp_path, ROOT))
    assert sorted(exported) == sorted(package)
    assert [f for f in exported if exported[f] != package[f]] == []


def test_one_version():
    settings = configparser.ConfigParser(interpolation=None)
    settings.read(ROOT/"settings.ini")
    assert anomdx.__version__ == settings["DEFAULT"]["version"]


def test_no_module_loads_the_writing_tools():
    "Every module imported, as a user would who has none of them."
    assert python(f"""
import importlib, sys
sys.modules["itk"] = None   # of the benchmarks: MONAI imports it where it is installed, and it imports IPython
for module in {MODULES}: importlib.import_module(module)
print(sorted({{m.split('.')[0] for m in sys.modules}} & set({TOOLS})))
""") == "[]"


def test_no_function_loads_the_writing_tools():
    "Nor does an import inside a function wait for them."
    named = [(p.name, n) for p in (ROOT/"anomdx").rglob("*.py") for n in imports(ast.parse(p.read_text(encoding="utf-8"))) if n in TOOLS]
    assert named == []


def test_top_level_is_light():
    heavy = ("torch", "monai", "pandas", "nibabel", "matplotlib", "sklearn")
    assert python(f"import sys, anomdx; print([m for m in {heavy} if m in sys.modules])") == "[]"
