"""What the notebook tests share: where the notebooks are, and which of their cells nbdev skips."""
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted(p for p in (ROOT/"nbs").rglob("*.ipynb") if not any(part.startswith((".", "_")) for part in p.parts))


def name(path: Path) -> str: return path.relative_to(ROOT/"nbs").with_suffix("").as_posix()
