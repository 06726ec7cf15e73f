"""Environments to install into, and what there is to build with."""

import importlib.metadata
import re
import shutil
import sys

import pytest
from installation import call, copy_sources


@pytest.fixture
def sources(tmp_path):
    return copy_sources(tmp_path / "sources")


@pytest.fixture(scope="session")
def path_without_compiler(tmp_path_factory):
    """A PATH on which there is no compiler."""
    folder = tmp_path_factory.mktemp("bin")
    for name in ("sh", "env", "uname", "git"):
        if shutil.which(name):
            (folder / name).symlink_to(shutil.which(name))
    return str(folder)


@pytest.fixture(scope="session")
def make_environment(tmp_path_factory):
    """A factory of virtual environments, given as their Python, that have this one's torch and not its imagegen."""
    shared = tmp_path_factory.mktemp("torch")
    for distribution in _needs("torch") | _needs("numpy"):
        for top in {file.parts[0] for file in importlib.metadata.files(distribution)} - {".."}:
            link = shared / top
            if not link.exists():
                link.symlink_to(importlib.metadata.distribution(distribution).locate_file(top))

    def make(with_torch=True):
        folder = tmp_path_factory.mktemp("environment")
        call(sys.executable, "-m", "venv", folder)
        if with_torch:
            version = f"python{sys.version_info.major}.{sys.version_info.minor}"
            (folder / f"lib/{version}/site-packages/torch.pth").write_text(str(shared))
        return folder / "bin/python"

    return make


def _needs(name, seen=()):
    """The installed distributions that one needs, itself included."""
    try:
        requires = importlib.metadata.requires(name) or []
    except importlib.metadata.PackageNotFoundError:  # for another platform
        return set()
    names = {re.match(r"[\w.-]+", r)[0] for r in requires if "extra ==" not in r} - {*seen, name}
    return {name}.union(*(_needs(n, (*seen, name)) for n in names))


@pytest.fixture(scope="session")
def build_here():
    """Options of pip that build with the tools of this environment, which the editable install put there."""
    for module in ("setuptools", "pybind11"):
        pytest.importorskip(module, reason=f"building without isolation needs {module}")
    return ("--no-build-isolation", "--no-deps", "--verbose")
