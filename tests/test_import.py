import os
import subprocess
import sys
from pathlib import Path

import imagegen

CODE = """
import sys, torch
before = set(sys.modules)
import imagegen
print(*sorted({name.partition(".")[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names)))
"""


def test_importing_the_package_imports_no_other_library_and_no_more_of_torch():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    root = Path(imagegen.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", CODE], env=environment, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["imagegen"]
