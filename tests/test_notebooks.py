"""Every notebook from top to bottom, one case each: what `nbdev_test` runs, with the failing cell in the report."""
import pytest
from nbdev.config import get_config
from nbdev.test import test_nb as run_notebook

from notebooks import NOTEBOOKS, name, ROOT

pytestmark = pytest.mark.no_cover   # test_package.py measures the package; tracing doubles the time of a notebook


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name)
def test_notebook(path, capfd):
    passed, seconds = run_notebook(path, skip_flags=get_config().tst_flags.split(), basepath=str(ROOT))
    if not passed: pytest.fail(capfd.readouterr().err, pytrace=False)
