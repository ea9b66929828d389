"""The site: every notebook has its place, no link leads nowhere; the README says what the front page says."""
import subprocess
import sys

import docs      # tools/docs.py
import pytest
import readme    # tools/readme.py
import yaml
from nbdev.config import get_config

from notebooks import NOTEBOOKS, ROOT


def test_the_site_has_every_page_and_no_broken_link():
    "On _docs/ as the notebooks are now: built here only where it is older than they are."
    pytest.importorskip("smalldocs", reason="smalldocs needs Python 3.11")
    site = ROOT/"_docs"
    sources = [*NOTEBOOKS, ROOT/"_quarto.yml"]
    if not (site/"index.html").exists() or (site/"index.html").stat().st_mtime < max(p.stat().st_mtime for p in sources):
        subprocess.run([sys.executable, ROOT/"tools"/"docs.py"], cwd=ROOT, check=True)
    pages = [p.relative_to(ROOT/"nbs").with_name(docs.number_dropped(p.name)).with_suffix(".html") for p in NOTEBOOKS]
    assert [str(p) for p in pages if not (site/p).exists()] == []
    assert docs.broken_links(site, get_config().doc_host + get_config().doc_baseurl) == []


def test_every_notebook_is_in_the_sidebar():
    def files(item):
        if isinstance(item, str): return [item]
        return [f for part in item["contents"] for f in files(part)]
    sidebar = yaml.safe_load((ROOT/"_quarto.yml").read_text())["website"]["sidebar"]
    assert sorted(files(sidebar)) == sorted(p.relative_to(ROOT/"nbs").as_posix() for p in NOTEBOOKS)


def test_broken_links_are_found(tmp_path):
    (tmp_path/"sub").mkdir()
    (tmp_path/"index.html").write_text('''<h1 id="top">here</h1> <a href="https://elsewhere.org/x">other host</a> <a href="#top">up</a>
        <a href="https://me.org/site/sub/page.html#part">page</a> <a href="gone.html">gone</a> <img src="data:image/png;base64,AA">''')
    (tmp_path/"sub"/"page.html").write_text('''<h2 id="part">part</h2> <a href="../">home</a> <a href="../index.html#bottom">no such place</a>
        <a href="https://me.org/site/gone.html">gone</a> <img src="gone.png">''')
    assert docs.broken_links(tmp_path, "https://me.org/site") == ["index.html: gone.html has no page",
        "sub/page.html: ../index.html#bottom has no such place", "sub/page.html: gone.png has no page",
        "sub/page.html: https://me.org/site/gone.html has no page"]


def test_readme_is_the_front_page():
    assert (ROOT/"README.md").read_text(encoding="utf-8") == readme.readme(ROOT)


def test_readme_links_work_on_another_host():
    text = "[data](06_datasets.ipynb#splits), [t](tutorials/first_map.ipynb), [up](#top), [o](https://o.org) ![p](p.png) ![q](https://o.org/q.png)"
    assert readme.absolute(text, "https://me.org") == ("[data](https://me.org/datasets.html#splits), "
        "[t](https://me.org/tutorials/first_map.html), [up](#top), [o](https://o.org)  ![q](https://o.org/q.png)")
    assert readme.absolute("```\n[a](b.ipynb)\n```\n", "https://me.org") == "```\n[a](b.ipynb)\n```\n"
