import os
import shutil

import pytest
from installation import ROOT, call

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not there")


def test_the_active_environment_does_not_reach_what_make_runs():
    show = 'show:; @echo "[$$PYTHONPATH$$PYTHONHOME$$VIRTUAL_ENV] $(BIN)/python"'
    said, _ = call("make", "-C", ROOT, "--eval", show, "show", PYTHONPATH="/elsewhere", VIRTUAL_ENV="/elsewhere")
    assert "[] .venv/bin/python\n" in said


def test_ci_runs_what_a_contributor_runs():
    script = ROOT / ".ci/run"
    assert os.access(script, os.X_OK)
    assert "make test\nmake lint\n" in script.read_text()
    assert "- run: .ci/run\n" in (ROOT / ".github/workflows/ci.yml").read_text()
