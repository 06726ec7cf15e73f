"""setuptools' build backend, except that a torch that is already installed serves as the build's torch.

The extension uses torch's stable C ABI alone: it needs torch's headers and nothing that must match the torch of the
build. pip's isolated build environment would otherwise fetch torch again: gigabytes, and perhaps another version.
"""

import sysconfig
from pathlib import Path

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403


def _torch_is_installed():
    return any(
        (Path(sysconfig.get_path(p)) / "torch/include/torch/csrc/stable").is_dir() for p in ("purelib", "platlib")
    )


def _with_torch(requires):
    return requires if _torch_is_installed() else [*requires, "torch>=2.10"]


def get_requires_for_build_wheel(config_settings=None):
    return _with_torch(build_meta.get_requires_for_build_wheel(config_settings))


def get_requires_for_build_editable(config_settings=None):
    return _with_torch(build_meta.get_requires_for_build_editable(config_settings))
