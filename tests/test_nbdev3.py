"""The same notebooks under nbdev 3: settings.ini serves nbdev 2, [tool.nbdev] in pyproject.toml serves nbdev 3."""
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from notebooks import ROOT

NBDEV = "nbdev==3.3.26"
SOME = ("04_config", "06_datasets", "20_models", "80_cli", "index")   # tested here; all are exported
NOT_COPIED = shutil.ignore_patterns(".*", "_docs", "_proc", "build", "dist", "runs", "checkpoints", "__pycache__", "*.egg-info")


def installed() -> Path:
    "The folder with nbdev 3 and what it needs, kept between runs; on PYTHONPATH it goes before this environment's packages."
    folder = ROOT/".venv-nbdev3"
    done = folder/f"{NBDEV}-py{sys.version_info.major}{sys.version_info.minor}"
    if not done.exists():
        shutil.rmtree(folder, ignore_errors=True)
        pip = [sys.executable, "-m", "pip", "install", "-q", "--progress-bar", "off", "--disable-pip-version-check"]
        subprocess.run([*pip, "--target", folder, NBDEV], check=True)
        done.touch()
    return folder


@pytest.mark.slow
def test_nbdev3_exports_the_same_and_passes(tmp_path):
    "The export differs by one line: nbdev 3 tells in each module's docstring where its page is."
    copy = shutil.copytree(ROOT, tmp_path/"anomdx", ignore=NOT_COPIED)
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(copy), str(installed())])}

    def run(code: str) -> str:
        done = subprocess.run([sys.executable, "-c", code], cwd=copy, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    assert run("import nbdev; print(nbdev.__version__)").strip() == NBDEV.split("==")[1]
    run("from nbdev.doclinks import nbdev_export; nbdev_export()")
    without_docs = {p.relative_to(copy): re.sub(r'\n\nDocs: https://\S+\.html\.md(?=""")', "", p.read_text(encoding="utf-8"), count=1)
                    for p in (copy/"anomdx").rglob("*.py")}
    assert [str(p) for p, text in without_docs.items() if text != (ROOT/p).read_text(encoding="utf-8")] == []
    for name in SOME:   # the code is the same under both: what could differ is how nbdev reads and runs a notebook
        assert "Success." in run(f"from nbdev.test import nbdev_test; nbdev_test(path='nbs/{name}.ipynb', n_workers=0)")
