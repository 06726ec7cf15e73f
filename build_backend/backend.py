"""setuptools' build backend, except that a torch that is already installed serves as the build's torch.

The extension uses torch's stable C ABI alone: it needs torch's headers and nothing that must match the torch of the
build. pip's isolated build environment would otherwise fetch torch again: gigabytes, and perhaps another version.
"""

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403

OLDEST_TORCH = (2, 10)
TORCH = "torch>=2.10"


def cxx_compiler():
    """The C++ compiler that CMake will find, or None where there is none."""
    asked = os.environ.get("CXX")
    if not asked:
        return next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    found = shutil.which(shlex.split(asked)[0])
    if found is None:
        raise SystemExit(f"imagegen: CXX={asked} names a compiler that is not there")
    return found


def torch_folder():
    """The folder of an installed torch that can be built against, or None."""
    return next(filter(_is_new_enough, (_torch_here(), _torch_of_the_user())), None)


def _torch_here():
    spec = importlib.util.find_spec("torch")  # found, not imported
    return Path(spec.origin).parent if spec and spec.origin else None


def _torch_of_the_user():
    """The torch of the environment pip installs into, which pip hides from an isolated build through PYTHONPATH.

    The interpreter itself, started without that variable, knows every place torch may be in: site-packages, the
    user's, the system's under a virtual environment, .pth files.
    """
    code = "import importlib.util as u; s = u.find_spec('torch'); print(s.origin if s and s.origin else '')"
    origin = subprocess.run([sys.executable, "-E", "-c", code], capture_output=True, text=True).stdout.strip()
    return Path(origin).parent if origin else None


def _is_new_enough(folder):
    if folder is None or not (folder / "version.py").is_file():
        return False
    version = re.search(r"__version__ = '(\d+)\.(\d+)", (folder / "version.py").read_text())
    return version is not None and tuple(map(int, version.groups())) >= OLDEST_TORCH


def _with_torch(requires):
    return requires if cxx_compiler() is None or torch_folder() else [*requires, TORCH]


def get_requires_for_build_wheel(config_settings=None):
    return _with_torch(build_meta.get_requires_for_build_wheel(config_settings))


def get_requires_for_build_editable(config_settings=None):
    return _with_torch(build_meta.get_requires_for_build_editable(config_settings))


# Without build isolation nobody asks for the requirements. pip then fetches what the package depends on between
# reading the metadata and building, so this is the place to say that torch is missing: before those gigabytes.
def prepare_metadata_for_build_wheel(metadata_directory, config_settings=None):
    _check_torch()
    return build_meta.prepare_metadata_for_build_wheel(metadata_directory, config_settings)


def prepare_metadata_for_build_editable(metadata_directory, config_settings=None):
    _check_torch()
    return build_meta.prepare_metadata_for_build_editable(metadata_directory, config_settings)


def _check_torch():
    if cxx_compiler() and torch_folder() is None:
        raise SystemExit(
            f"imagegen: {TORCH} is needed to build without build isolation, and is not installed: pip install '{TORCH}'"
        )


def build_wheel(wheel_directory, config_settings=None, metadata_directory=None):
    for stale in Path("build").glob("lib*"):  # setuptools would pack what an earlier build has left there
        shutil.rmtree(stale)
    return build_meta.build_wheel(wheel_directory, config_settings, metadata_directory)
