import os
import re
import shutil
import subprocess

import pytest
from installation import ROOT, call

from benchmarks import __main__ as benchmarks

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not there")


def test_the_active_environment_does_not_reach_what_make_runs():
    show = 'show:; @echo "[$$PYTHONPATH$$PYTHONHOME$$VIRTUAL_ENV] $(BIN)/python"'
    said, _ = call("make", "-C", ROOT, "--eval", show, "show", PYTHONPATH="/elsewhere", VIRTUAL_ENV="/elsewhere")
    assert "[] .venv/bin/python\n" in said


GPU_PYTHON = """#!/bin/sh
case "$2" in
*get_device_name*) echo "NVIDIA H200" ;;
*) echo "$*" >>"$LOG"; case "$*" in *"suite end_to_end"*) exit 3 ;; esac ;;
esac
"""


def run_on_gpu(folder, python):
    """.ci/gpu where .venv/bin/python is this script: (exit status, what it said, what it ran)."""
    shutil.copytree(ROOT / ".ci", folder / ".ci")
    (folder / ".venv/bin").mkdir(parents=True)
    for program, text in ((".venv/bin/python", python), ("compute-sanitizer", '#!/bin/sh\necho "$*" >>"$LOG"\n')):
        (folder / program).write_text(text)
        (folder / program).chmod(0o755)
    environment = os.environ | {"LOG": str(folder / "log"), "PATH": f"{folder}:{os.environ['PATH']}"}
    done = subprocess.run([folder / ".ci/gpu"], capture_output=True, text=True, env=environment)
    return done.returncode, done.stdout, (folder / "log").read_text().splitlines() if python == GPU_PYTHON else []


def test_on_a_gpu_no_failure_stops_what_comes_after_it(tmp_path):
    status, said, ran = run_on_gpu(tmp_path, GPU_PYTHON)
    info, tests, memcheck, racecheck, ops, whole, compiled, report = ran
    assert info == "-m imagegen info" and tests.startswith("-m pytest ")
    assert "--tool memcheck" in memcheck and "--tool racecheck" in racecheck
    file = ops.partition("--out ")[2]
    assert re.fullmatch(r"benchmarks/results/nvidia-h200-\d{4}-\d\d-\d\d\.json", file)
    assert compiled.endswith(f"--append --out {file}") and "--suite end_to_end" in whole and file in report
    assert status == 1 and said.endswith("\nnot passed: end_to_end (failed)\n")
    for command in (ops, whole, compiled, report):
        options = command.replace("upsample_conv2d bfloat16", "upsample_conv2d").split()
        assert callable(benchmarks._parser().parse_args(options[2:]).command)


def test_without_a_gpu_nothing_is_begun(tmp_path):
    status, said, _ = run_on_gpu(tmp_path, "#!/bin/sh\necho 2.13.0\ncase $2 in *get_device_name*) exit 1 ;; esac\n")
    assert (status, said) == (1, "no CUDA device is available to torch: 2.13.0\n")


def test_ci_runs_what_a_contributor_runs():
    script = ROOT / ".ci/run"
    assert os.access(script, os.X_OK)
    assert "make test\nmake lint\n" in script.read_text()
    assert "- run: .ci/run\n" in (ROOT / ".github/workflows/ci.yml").read_text()
