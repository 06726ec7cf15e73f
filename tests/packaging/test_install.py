"""The ways to install, from sources that have never been built, into environments that have torch already."""

import os
import re
import shutil
import sys
import sysconfig

import pytest
from installation import ROOT, SMOKE, build_sdist, call, copy_sources

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not shutil.which("c++"), reason="a C++ compiler is not there"),
]

OLDEST_TORCH, OTHER_TORCH = "2.10.0", "2.14.1"
TORCH_GIB = 9  # unpacked, and while pip unpacks it
CPU_ONLY = {"CMAKE_ARGS": "-DIMAGEGEN_CUDA=OFF"}  # half the time; the CUDA build has tests of its own


def compiled(said):
    return re.findall(r"\[\d+/\d+\] Building CXX object \S*/(csrc/\S+)\.o", said)


def torch_file(python):
    return call(python, "-c", "import torch; print(torch.__file__)")[0]


def assert_torch_is_left_alone(said):
    """Nothing named torch was fetched or installed: neither for the isolated build, nor beside the package."""
    lines = [line for line in said.splitlines() if re.match(r" *(Collecting|Downloading|Using cached) ", line)]
    assert lines and not [line for line in lines if re.search(r"\btorch\b", line.partition(" (from")[0])]
    assert "Requirement already satisfied: torch>=2.10" in said
    assert not re.search("Successfully (un)?installed .*torch-", said)


def test_pip_install_builds_beside_the_installed_torch(sources, make_environment):
    python = make_environment()
    before = torch_file(python)
    said, _ = call(python, "-m", "pip", "install", "--verbose", sources, **CPU_ONLY)
    assert_torch_is_left_alone(said)
    assert torch_file(python) == before
    assert "CPU kernels: " in call(python, "-c", SMOKE)[0]


def test_an_editable_install_outlives_the_environment_it_was_built_in(sources, make_environment):
    python = make_environment()
    install = (python, "-m", "pip", "install", "--verbose", "--editable", sources)
    first, _ = call(*install, **CPU_ONLY)
    assert_torch_is_left_alone(first)
    assert any("_kernel.cpp" in name for name in compiled(first))
    # The second build's cmake, ninja and pybind11 are in another place; the objects of the first still serve.
    second, _ = call(*install, **CPU_ONLY)
    assert not any("_kernel.cpp" in name for name in compiled(second))
    changed = sources / "csrc/ops/cpu/bias_act_kernel.cpp"
    os.utime(changed)
    third, _ = call(*install, **CPU_ONLY)
    assert {name for name in compiled(third) if "_kernel.cpp" in name} == {changed.relative_to(sources).as_posix()}
    assert "CPU kernels: " in call(python, "-c", SMOKE)[0]
    where, _ = call(python, "-c", "import imagegen; print(imagegen.__file__)")
    assert where.strip() == str(sources / "imagegen/__init__.py")


def test_the_source_distribution_installs(sources, tmp_path, make_environment, build_here):
    python = make_environment()
    said, _ = call(python, "-m", "pip", "install", "--verbose", build_sdist(sources, tmp_path), **CPU_ONLY)
    assert_torch_is_left_alone(said)
    assert "CPU kernels: " in call(python, "-c", SMOKE)[0]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory, build_here):
    """The wheel for this machine, with CUDA kernels where there is nvcc."""
    folder = tmp_path_factory.mktemp("wheel")
    sources = copy_sources(folder / "sources")
    call(sys.executable, "-m", "pip", "wheel", *build_here, "--wheel-dir", folder, sources)
    (wheel,) = folder.glob("*.whl")
    return wheel


def test_the_library_names_no_path_of_the_machine_it_was_built_on(wheel, tmp_path):
    shutil.unpack_archive(wheel, tmp_path, "zip")
    (library,) = tmp_path.glob("imagegen/_C*")
    content = library.read_bytes()
    for path in (wheel.parent, sysconfig.get_path("purelib")):
        assert str(path).encode() not in content


def test_the_wheel_works_beside_another_torch(wheel, tmp_path):
    python = environment_with(OTHER_TORCH)
    call(python, "-m", "pip", "install", "--no-deps", "--target", tmp_path, wheel)
    said, _ = call(python, "-c", SMOKE, PYTHONPATH=tmp_path)
    assert f"imagegen on torch {OTHER_TORCH}" in said
    assert "CPU kernels: " in said


def test_the_sources_build_beside_the_oldest_torch(sources, tmp_path):
    python = environment_with(OLDEST_TORCH)
    call(python, "-m", "pip", "install", "--no-deps", "--target", tmp_path, sources, **CPU_ONLY)
    said, _ = call(python, "-c", SMOKE, PYTHONPATH=tmp_path)
    assert f"imagegen on torch {OLDEST_TORCH}" in said
    assert "CPU kernels: " in said


def environment_with(torch):
    """The Python of an environment with that version of torch. It is kept, because it is gigabytes: under build/."""
    folder = ROOT / f"build/torch-{torch}"
    python, complete = folder / "bin/python", folder / "complete"
    if not complete.exists():
        if shutil.disk_usage(ROOT).free < TORCH_GIB * 2**30:
            pytest.skip(f"torch {torch} needs {TORCH_GIB} GiB of disk")
        call(sys.executable, "-m", "venv", folder)
        said, status = call(python, "-m", "pip", "install", f"torch=={torch}", "numpy", check=False)
        if status:
            pytest.skip(f"torch {torch} can't be installed: {said.splitlines()[-1]}")
        complete.touch()
    return python
