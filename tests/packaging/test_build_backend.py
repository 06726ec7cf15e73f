import importlib.util
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
TORCH = Path(torch.__file__).parent


@pytest.fixture
def backend(monkeypatch):
    """The in-tree build backend, imported as pip does: from its folder, where the sources are."""
    pytest.importorskip("setuptools", reason="the build backend is setuptools'")
    monkeypatch.chdir(ROOT)
    spec = importlib.util.spec_from_file_location("backend", ROOT / "build_backend/backend.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module.build_meta, "get_requires_for_build_wheel", lambda settings: ["other"])
    monkeypatch.setattr(module.build_meta, "get_requires_for_build_editable", lambda settings: ["other"])
    monkeypatch.setattr(module, "cxx_compiler", lambda: "c++")
    return module


def requirements(backend):
    wheel, editable = backend.get_requires_for_build_wheel(), backend.get_requires_for_build_editable()
    assert wheel == editable
    return wheel


def test_an_installed_torch_is_not_asked_for(backend):
    assert requirements(backend) == ["other"]


def test_a_torch_that_pip_hides_from_the_isolated_build_is_found(backend, monkeypatch):
    monkeypatch.setattr(backend, "_torch_here", lambda: None)
    assert backend.torch_folder() == TORCH


def test_without_torch_it_is_asked_for(backend, monkeypatch):
    monkeypatch.setattr(backend, "torch_folder", lambda: None)
    assert requirements(backend) == ["other", "torch>=2.10"]


def test_without_a_compiler_torch_is_not_needed_to_build(backend, monkeypatch):
    monkeypatch.setattr(backend, "torch_folder", lambda: None)
    monkeypatch.setattr(backend, "cxx_compiler", lambda: None)
    assert requirements(backend) == ["other"]


@pytest.mark.parametrize("hook", ["prepare_metadata_for_build_wheel", "prepare_metadata_for_build_editable"])
def test_missing_torch_is_one_sentence_before_anything_is_fetched(backend, monkeypatch, hook):
    monkeypatch.setattr(backend, "torch_folder", lambda: None)
    with pytest.raises(SystemExit, match=r"^imagegen: torch>=2\.10 is needed to build.*pip install 'torch>=2\.10'$"):
        getattr(backend, hook)("unused")


@pytest.mark.parametrize(
    "version, accepted",
    [("2.9.1", False), ("1.13.0", False), ("2.10.0a0+git123", True), ("2.13.0+cpu", True), ("3.0.0", True)],
)
def test_a_torch_older_than_the_stable_abi_does_not_count(backend, monkeypatch, tmp_path, version, accepted):
    (tmp_path / "version.py").write_text(f"from typing import Optional\n__version__ = '{version}'\ndebug = False\n")
    monkeypatch.setattr(backend, "_torch_here", lambda: tmp_path)
    monkeypatch.setattr(backend, "_torch_of_the_user", lambda: None)
    assert backend.torch_folder() == (tmp_path if accepted else None)


def test_a_compiler_asked_for_must_be_there(backend, monkeypatch):
    monkeypatch.undo()
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("CXX", "no-such-compiler -m64")
    with pytest.raises(SystemExit, match="CXX=no-such-compiler -m64 names a compiler that is not there"):
        backend.cxx_compiler()


def test_no_compiler_is_none(backend, monkeypatch, tmp_path):
    monkeypatch.undo()
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert backend.cxx_compiler() is None
