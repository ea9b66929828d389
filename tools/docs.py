"""Build the site into _docs/ without Quarto: nbdev processes the notebooks, smalldocs renders them by _quarto.yml.

Pages have the addresses that `nbdev_docs` (nbdev with Quarto) gives them. Exits with 1 on a broken link."""
import re
import shutil
import subprocess
import sys
import tempfile
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
        quarto.write_text(re.sub(r"[^\s\[\],/]+\.ipynb", lambda m: number_dropped(m[0]), quarto.read_text(encoding="utf-8")), encoding="utf-8")
        subprocess.run([Path(sys.executable).with_name("smalldocs"), "render", "--quiet", "--strict", src], check=True)
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(src/out.name, out)


def main() -> int:
    cfg = get_config()
    out = Path(cfg.config_path)/cfg.doc_path.name
    try: build(out)
    except subprocess.CalledProcessError: return 1   # smalldocs has said why
    broken = broken_links(out, cfg.doc_host + cfg.doc_baseurl)
    for line in broken: print(line)
    print(f"{out.name}: {len(list(out.rglob('*.html')))} pages, {len(broken)} broken links")
    return 1 if broken else 0


if __name__ == "__main__": sys.exit(main())
