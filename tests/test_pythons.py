"""pip can install anomdx on the oldest Python that it promises: no bound of a requirement shuts it out"""
import re
from importlib.metadata import PackageNotFoundError, metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

tomllib = pytest.importorskip("tomllib", reason="Python 3.10 cannot read pyproject.toml; pip installing "
    "it there is the test")
PROJECT = tomllib.loads((Path(__file__).parent.parent/"pyproject.toml").read_text())["project"]
OLDEST = re.search(r"\d+\.\d+", PROJECT["requires-python"])[0]
# The newest release of these wants a newer Python; the last one that did not must stay within the bound.
LAST = dict(filelock="4.1.0", typer="0.29.1")


def requirements():
    "Every requirement of the package and its extras that has a bound and applies to the oldest Python; without one, an old release will do"
    lists = [PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()]
    found = {r.name: r for r in map(Requirement, sum(lists, [])) if r.name != PROJECT["name"] and r.specifier}
    return [r for r in found.values() if not r.marker
            or r.marker.evaluate({"python_version": OLDEST, "python_full_version": f"{OLDEST}.0"})]


@pytest.mark.parametrize("wanted", requirements(), ids=lambda r: r.name)
def test_a_release_for_the_oldest_python_is_within_the_bound(wanted):
    try: newest = metadata(wanted.name)
    except PackageNotFoundError: pytest.skip(f"{wanted.name} is not installed")
    if SpecifierSet(newest["Requires-Python"] or "").contains(f"{OLDEST}.99"): return
    assert wanted.name in LAST, (f"{wanted.name} {newest['Version']} wants Python "
                                 f"{newest['Requires-Python']}, not {OLDEST}; which release was the last "
                                 "for it?")
    assert wanted.specifier.contains(
        LAST[wanted.name]), f"{wanted}: the last release for Python {OLDEST} is {LAST[wanted.name]}"
