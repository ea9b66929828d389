"""The site: every notebook has its place, no paragraph of it is lost, no link leads nowhere; the README is the front page."""
import json
import re
import subprocess
import sys

import docs      # tools/docs.py
import pytest
import readme    # tools/readme.py
import yaml
from nbdev.config import get_config

from notebooks import NOTEBOOKS, ROOT


@pytest.fixture(scope="module")
def site():
    "_docs/ as the notebooks are now: built here only where it is older than they are."
    pytest.importorskip("smalldocs", reason="smalldocs needs Python 3.11")
    folder = ROOT/"_docs"
    sources = [*NOTEBOOKS, ROOT/"_quarto.yml", ROOT/"nbs"/"site.css"]
    if not (folder/"index.html").exists() or (folder/"index.html").stat().st_mtime < max(p.stat().st_mtime
            for p in sources):
        # what it finds is found again below
        subprocess.run([sys.executable, ROOT/"tools"/"docs.py"], cwd=ROOT)
    return folder


def test_the_site_has_every_page_and_no_broken_link(site):
    pages = [p.relative_to(ROOT/"nbs").with_name(docs.number_dropped(p.name)).with_suffix(".html") for p in NOTEBOOKS]
    assert [str(p) for p in pages if not (site/p).exists()] == []
    assert docs.broken_links(site, get_config().doc_host + get_config().doc_baseurl) == []


def test_every_paragraph_of_every_notebook_stands_on_its_page(site):
    "Title, purpose and introduction among them."
    assert docs.lost_paragraphs(site, ROOT/"nbs", NOTEBOOKS) == []


def test_the_front_page_says_how_to_begin(site):
    page = (site/"index.html").read_text(encoding="utf-8")
    assert re.findall(r"<h2[^>]*>(Two commands|Install)</h2>", page) == ["Two commands", "Install"]


def test_the_widths_of_the_site_come_from_its_own_style_sheet(site):
    "110 columns of code at 1280 px need it; its settings for Quarto are no warning of smalldocs."
    assert (site/"site.css").read_text() == (ROOT/"nbs"/"site.css").read_text()
    assert all('href="site.css"' in (site/p).read_text(encoding="utf-8")
               for p in ("index.html", "loaders.html"))
    assert "grid" in yaml.safe_load((ROOT/"_quarto.yml").read_text())["format"]["html"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_the_first_cell_holds_title_and_purpose_alone(path):
    "nbdev makes the header of a page of it, and drops whatever else is in it."
    cell = json.loads(path.read_text(encoding="utf-8"))["cells"][0]
    assert cell["cell_type"] == "markdown"
    assert re.fullmatch(r"# \S[^\n]*\n+> \S[^\n]*\n*", "".join(cell["source"]))


MARKDOWN = """# Title
> purpose of *it*

A *first* paragraph with `code`, a [link](x.ipynb) and 'quotes' -- and a dash
on two lines.

- an item
  - inside another

1. numbered

| head | of a table |
|---|---|
| cell | `of` one |

```python
x = "fence"
```

    indented

## A heading
![a picture says nothing](p.png)
"""


def test_markdown_is_taken_apart():
    assert docs.paragraphs(MARKDOWN) == ["Title", "purpose of it", "A first paragraph with code, a link "
        "and 'quotes' -- and a dash on two lines.",
        "an item", "inside another", "numbered", "head", "of a table", "cell", "of one", 'x = "fence"\n',
        "indented\n", "A heading"]


@pytest.mark.parametrize("lost", ["Title", "purpose of <em>it</em>", "a <a href='x.html'>link</a>", "an item",
                                  "inside another", "of a table", "<code>of</code> one",
                                  "fence", "A heading"])
def test_what_a_page_lost_is_named(tmp_path, lost):
    "The same page with and without one of its parts; what stands outside <main>, or in a script, does not count."
    html = """<h1>Title</h1><p>purpose of <em>it</em></p><p>A <em>first</em> paragraph with <code>code</code>, a <a href='x.html'>link</a> and
        ‘quotes’ – and a dash on two lines.</p><ul><li>an item<ul><li>inside another</li></ul></li></ul><ol><li>numbered</li></ol>
        <table><tr><th>head</th><th>of a table</th></tr><tr><td>cell</td><td><code>of</code> one</td></tr></table>
        <pre>x = <span>"fence"</span></pre><pre>indented</pre><h2>A heading</h2>"""
    notebook = tmp_path/"nbs"/"00_page.ipynb"
    notebook.parent.mkdir()
    notebook.write_text(json.dumps(dict(cells=[dict(cell_type="markdown", source=[MARKDOWN])])))
    assert html.count(lost) == 1
    for page, number in ((html, 0), (html.replace(lost, ""), 1)):
        (tmp_path/"page.html").write_text(f"<nav>{html}</nav><main>{page}<script>{html}</script></main>",
                                          encoding="utf-8")
        assert len(docs.lost_paragraphs(tmp_path, tmp_path/"nbs", [notebook])) == number


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
