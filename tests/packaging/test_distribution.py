"""What the wheel and the source distribution hold, and how one works that was built where there is no compiler."""

import re
import sys
import tarfile
import zipfile

import pytest
from installation import CALLS, ROOT, build_sdist, call, copy_sources

USE = f"""{CALLS}
import warnings
for name, call in calls.items():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call(), call()
    (warning,) = caught
    assert str(warning.message).startswith(name + " runs in eager PyTorch"), warning.message
    assert "no C++ compiler was found when imagegen was installed" in str(warning.message)
imagegen.info()
"""


@pytest.fixture(scope="module")
def without_compiler(tmp_path_factory, build_here, path_without_compiler):
    """The wheel of a machine without a compiler, and what pip said while it was built."""
    folder = tmp_path_factory.mktemp("wheel")
    sources = copy_sources(folder / "sources")
    stale = sources / "build/lib.stale/imagegen"  # as an earlier build would leave it
    stale.mkdir(parents=True)
    (stale / "_C.stale.so").touch()
    build = (sys.executable, "-m", "pip", "wheel", *build_here, "--wheel-dir", folder, sources)
    said, _ = call(*build, PATH=path_without_compiler, CXX=None)
    (wheel,) = folder.glob("*.whl")
    return wheel, said


def test_no_compiler_is_a_warning(without_compiler):
    _, said = without_compiler
    assert "imagegen: WARNING: no C++ compiler was found (CXX, c++, g++, clang++)" in said


def test_without_a_compiler_every_op_runs_in_eager_and_says_why(without_compiler, make_environment):
    wheel, _ = without_compiler
    python = make_environment()
    call(python, "-m", "pip", "install", "--no-deps", wheel)
    said, _ = call(python, "-c", USE)
    assert "the compiled kernels are not there: no C++ compiler was found when imagegen was installed" in said
    assert len(re.findall("cpu +the compiled kernels are not there: see above", said)) >= 3


def test_the_wheel_holds_the_package_and_nothing_else(without_compiler):
    wheel, _ = without_compiler
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert names == {path.relative_to(ROOT).as_posix() for path in ROOT.glob("imagegen/**/*.py")}


def test_the_wheel_does_not_pin_torch(without_compiler):
    wheel, _ = without_compiler
    (metadata,) = (name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".dist-info/METADATA"))
    lines = zipfile.ZipFile(wheel).read(metadata).decode().splitlines()
    requires = [line.removeprefix("Requires-Dist: ") for line in lines if line.startswith("Requires-Dist: ")]
    assert [r for r in requires if r.startswith("torch")] == ["torch>=2.10"]


def test_torch_is_no_static_build_requirement():
    requires = re.search(r"\[build-system\]\nrequires = \[(.*?)\]", (ROOT / "pyproject.toml").read_text())
    assert "torch" not in requires[1]


def test_the_source_distribution_holds_what_it_takes_to_build(sources, tmp_path, build_here):
    with tarfile.open(build_sdist(sources, tmp_path)) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    for pattern in ("csrc/**/*.*", "imagegen/**/*.py", "build_backend/*.py", "*.toml", "CMakeLists.txt", "setup.py"):
        needed = {path.relative_to(sources).as_posix() for path in sources.glob(pattern)}
        assert needed and needed <= names
    assert [name for name in names if name.startswith(("tests", "benchmarks"))] == []
    assert [name for name in names if name.endswith((".so", ".pyc"))] == []
