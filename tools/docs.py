"""Build the site into _docs/ without Quarto: nbdev processes the notebooks, smalldocs renders them by _quarto.yml.

Pages have the addresses that `nbdev_docs` (nbdev with Quarto) gives them. Exits with 1 on a broken link and on a lost paragraph."""
import json
import re
import shutil
import subprocess
import sys
import tempfile
import unicodedata
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urljoin, urlsplit

from nbdev.config import get_config
from nbdev.serve import proc_nbs


class Page(HTMLParser):
    "The links a page makes, and the places in it that a link can name."

    def __init__(self, html: str):
        super().__init__()
        self.links, self.places = set(), set()
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list):
        for name, value in attrs:
            if name in ("id", "name") and value: self.places.add(value)
            if name in ("href", "src") and value and not (tag == "link" and ("rel", "canonical") in attrs): self.links.add(value)


def broken_links(
    site: Path,  # folder of built pages
    url: str,    # address it will have; links that start with it are links into `site`
) -> list[str]:  # one line for each link that leads nowhere
    "Follow every link of every page that stays inside the site, with the place (#name) it points at."
    url = url.rstrip("/") + "/"
    pages = {p.relative_to(site).as_posix(): Page(p.read_text(encoding="utf-8")) for p in sorted(site.rglob("*.html"))}
    broken = []
    for name, page in pages.items():
        for link in sorted(page.links):
            full = urljoin(url + name, link)
            if not full.startswith(url): continue   # elsewhere: another host, data:, mailto:
            parts = urlsplit(full[len(url):])
            target, place = unquote(parts.path), unquote(parts.fragment)
            if target == "" or target.endswith("/"): target += "index.html"
            if not (site/target).is_file(): broken.append(f"{name}: {link} has no page")
            elif place and target in pages and place not in pages[target].places: broken.append(f"{name}: {link} has no such place")
    return broken


class Words(HTMLParser):
    "The text inside <main> of a page, without scripts"

    def __init__(self, html: str):
        super().__init__()
        self.depth, self.silent, self.parts = 0, 0, []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list):
        self.depth += tag == "main"
        self.silent += tag in ("script", "style")

    def handle_endtag(self, tag: str):
        self.depth -= tag == "main"
        self.silent -= tag in ("script", "style")

    def handle_data(self, data: str):
        if self.depth and not self.silent:
            self.parts.append(data)


def compact(text: str) -> str:
    "Text without blanks, and with one kind of quotes and dashes, for a renderer may change all three."
    text = unicodedata.normalize("NFKC", text)
    text = re.sub(r"[\u2018\u2019\u201c\u201d\"'`]", "'", text)
    return re.sub(r"\s|\\[()]|\$", "", re.sub(r"-{2,3}|[\u2010-\u2015]", "-", text))


def paragraphs(markdown: str) -> list[str]:
    "Each paragraph, heading, list item, table cell and code fence of a markdown cell, as plain text."
    from markdown_it import MarkdownIt   # which smalldocs brings along
    found = []
    for token in MarkdownIt("commonmark").enable("table").parse(markdown):
        if token.type in ("fence", "code_block"):
            found.append(token.content)
        elif token.type == "html_block":
            found.append(re.sub(r"<[^>]*>", "", token.content))
        elif token.type == "inline":
            found.append("".join(plain(child) for child in token.children))
    return [text for text in found if compact(text)]


def plain(token) -> str:  # a markdown-it token inside a paragraph
    "The text that a reader sees of it; of a picture none."
    if token.type in ("softbreak", "hardbreak"):
        return " "
    return token.content if token.type in ("text", "code_inline") else ""


def lost_paragraphs(
    site: Path,              # folder of built pages
    nbs: Path,               # folder of their notebooks
    notebooks: list[Path],   # in it
) -> list[str]:              # one line for each paragraph that its page lacks, in the notebook's order
    "Compare the markdown cells of notebooks with their pages."
    lost = []
    for path in notebooks:
        page = path.relative_to(nbs).with_name(number_dropped(path.name)).with_suffix(".html")
        text = compact("".join(Words((site/page).read_text(encoding="utf-8")).parts))
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        at = 0
        for paragraph in (p for c in cells if c["cell_type"] == "markdown"
                          for p in paragraphs("".join(c["source"]))):
            wanted = compact(paragraph)
            found = text.find(wanted, at)
            if found < 0:
                lost.append(f"{page} lacks {' '.join(paragraph.split())[:70]!r}")
            else:
                at = found + len(wanted)
    return lost


def number_dropped(name: str) -> str:  # 00_loaders.ipynb -> loaders.ipynb
    "The name under which nbdev publishes a notebook."
    return re.sub(r"^\d+[a-zA-Z0-9]*_", "", name)


def build(
    out: Path,  # where the site goes; what was there is removed
):
    "Process, rename and render the notebooks. Raises when a notebook or a page has a fault."
    with tempfile.TemporaryDirectory() as tmp:
        src = Path(shutil.copytree(proc_nbs(n_workers=2, force=True), Path(tmp)/"site"))
        for nb in src.rglob("*.ipynb"):   # nbdev asks Quarto for the new name by `output-file`; smalldocs uses the file's own
            text = re.sub(r'"output-file: [^"]*",?\s*', "", nb.read_text(encoding="utf-8"))
            text = re.sub(r"(\]\((?:[^()\s/]+/)*)([^()\s/]+\.ipynb)", lambda m: m[1] + number_dropped(m[2]), text)   # [label](folder/file
            nb.write_text(text, encoding="utf-8")
            nb.rename(nb.with_name(number_dropped(nb.name)))
        quarto = src/"_quarto.yml"
        # Quarto's widths; smalldocs takes site.css
        settings = re.sub(r" *grid:.*\n(?: {6,}.*\n)*", "", quarto.read_text(encoding="utf-8"))
        quarto.write_text(re.sub(r"[^\s\[\],/]+\.ipynb", lambda m: number_dropped(m[0]), settings),
                          encoding="utf-8")
        subprocess.run([Path(sys.executable).with_name("smalldocs"), "render", "--quiet", "--strict", src], check=True)
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(src/out.name, out)


def main() -> int:
    cfg = get_config()
    out = Path(cfg.config_path)/cfg.doc_path.name
    try: build(out)
    except subprocess.CalledProcessError: return 1   # smalldocs has said why
    broken = broken_links(out, cfg.doc_host + cfg.doc_baseurl)
    notebooks = [p for p in sorted(cfg.nbs_path.rglob("*.ipynb"))
                 if not any(part[0] in "._" for part in p.relative_to(cfg.nbs_path).parts)]
    lost = lost_paragraphs(out, cfg.nbs_path, notebooks)
    for line in [*broken, *lost]: print(line)
    print(f"{out.name}: {len(list(out.rglob('*.html')))} pages, {len(broken)} broken links, "
        f"{len(lost)} lost paragraphs")
    return 1 if broken or lost else 0


if __name__ == "__main__": sys.exit(main())
