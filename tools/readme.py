"""Write README.md from nbs/index.ipynb, so that the front page of the site and of the repository have one source.

Text stays as it is; code becomes fences, its short text outputs too. Links to other pages lead to the site, because a README is
also read on PyPI. Pictures need an absolute address there and are left out otherwise. `--check` writes nothing and exits with 1
where README.md differs."""
import configparser
import json
import re
import sys
from pathlib import Path

HEAD = "<!-- Written by tools/readme.py from nbs/index.ipynb: edit that notebook. -->\n\n"
NOT_SHOWN = {"hide", "hide_input", "export", "exporti", "exports", "default_exp", "echo"}
LONGEST = 30   # lines of an output that a README still shows


def page_url(link: str, site: str) -> str:  # 06_datasets.ipynb#splits -> https://…/datasets.html#splits
    "The address on the site of a page that the notebook names by its file."
    path, place, name = link.partition("#")
    *folders, file = path.split("/")
    file = re.sub(r"\.(ipynb|qmd)$", ".html", re.sub(r"^\d+[a-zA-Z0-9]*_", "", file))
    return "/".join([site, *folders, file]) + place + name


def absolute(text: str, site: str) -> str:
    "Markdown whose links all work on another host; fenced code is not touched."
    def link(m):
        picture, label, target = m[1], m[2], m[3]
        if re.match(r"[a-z]+:|#", target): return m[0]
        return "" if picture else f"[{label}]({page_url(target, site)})"
    parts = re.split(r"(^```.*?^```)", text, flags=re.M | re.S)
    return "".join(p if p.startswith("```") else re.sub(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)", link, p) for p in parts)


def fenced(text: str, language: str = "") -> str: return f"```{language}\n{text.rstrip()}\n```"


def outputs(cell: dict) -> list[str]:
    "What the cell printed or returned, where that is text and short."
    texts = []
    for out in cell["outputs"]:
        data = out.get("data", {})
        if any(kind.startswith("image/") for kind in data) or out.get("name") == "stderr": continue
        text = "".join(out.get("text", data.get("text/plain", "")))
        if "text/markdown" in data: texts.append("".join(data["text/markdown"]))
        elif text.strip() and len(text.splitlines()) <= LONGEST: texts.append(fenced(text))
    return texts


def readme(root: Path) -> str:
    "README.md as index.ipynb wants it."
    settings = configparser.ConfigParser(interpolation=None)
    settings.read(root/"settings.ini")
    site = settings["DEFAULT"]["doc_host"] + settings["DEFAULT"]["doc_baseurl"]
    blocks = []
    for cell in json.loads((root/"nbs"/"index.ipynb").read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        directives = set(re.findall(r"^#\|\s*(\w+)", source, re.M))
        if cell["cell_type"] == "markdown": blocks.append(absolute(source, site).strip())
        elif cell["cell_type"] == "code" and not directives & NOT_SHOWN:
            code = "\n".join(line for line in source.splitlines() if not line.startswith("#|")).strip()
            if code: blocks += [fenced(code, "python"), *outputs(cell)]
    return HEAD + "\n\n".join(b for b in blocks if b) + "\n"


def main(args: list[str]) -> int:
    root = Path(__file__).resolve().parent.parent
    path, text = root/"README.md", readme(root)
    if path.exists() and path.read_text(encoding="utf-8") == text: return 0
    if "--check" not in args:
        path.write_text(text, encoding="utf-8")
        return 0
    print("README.md is not what nbs/index.ipynb says: run python tools/readme.py")
    return 1


if __name__ == "__main__": sys.exit(main(sys.argv[1:]))
