"""Damaged, lying and malicious files load or raise LoadError, in little time and memory: a small part of `python tests/fuzz_loaders.py`"""
import sys

import pytest

from fuzz_loaders import fuzz, make_case, seeds


def test_cases_can_be_made_again(tmp_path):
    files = seeds(tmp_path/"seeds")
    for number in range(25):
        made = []
        for name in ("a", "b"):
            folder = tmp_path/name/str(number); folder.mkdir(parents=True)
            made.append((make_case(number, 0, files, folder)[1], {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}))
        assert made[0] == made[1]


@pytest.mark.no_cover   # the loaders run in other processes
@pytest.mark.skipif(sys.platform == "win32", reason="limits of memory are set by POSIX calls")
def test_only_load_errors(capsys):
    counts, bad = fuzz(range(1500), seed=1, jobs=2)
    with capsys.disabled(): print("", {name: " ".join(f"{v} {k}" for k, v in sorted(c.items())) for name, c in counts.items()}, end="")
    assert bad == []
    assert all(c["loaded"] > 4 and c["refused"] > 40 for name, c in counts.items() if name != "bomb")   # neither too gentle nor too rough
