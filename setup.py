"""Drives CMake; nothing else lives here."""

import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext


def torch_root():
    """The folder of a torch with the stable ABI's headers: this environment's, else the one pip builds for."""
    spec = importlib.util.find_spec("torch")  # found, not imported
    roots = [Path(spec.origin).parent] if spec and spec.origin else []
    roots += [Path(sysconfig.get_path(p)) / "torch" for p in ("purelib", "platlib")]
    for root in roots:
        if (root / "include/torch/csrc/stable").is_dir():
            return root
    raise SystemExit("imagegen: torch >= 2.10 is needed to build; install it first: pip install torch")


def cxx_compiler():
    asked = os.environ.get("CXX")
    return (
        shutil.which(shlex.split(asked)[0])
        if asked
        else next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    )


class CMakeBuild(build_ext):
    def run(self):
        if cxx_compiler() is None:
            print(
                "imagegen: WARNING: no C++ compiler was found (CXX, c++, g++, clang++), so no kernel is compiled; "
                "every op will run in eager PyTorch. Install one and reinstall for speed.",
                file=sys.stderr,
            )
            self.extensions = []
        super().run()

    def build_extension(self, ext):
        target = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        source = Path(__file__).resolve().parent
        # An editable install keeps its build folder, so that the next one compiles only what changed.
        build = source / "build/editable" if self.editable_mode else Path(self.build_temp).resolve()
        build.mkdir(parents=True, exist_ok=True)
        options = [
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DTORCH_ROOT={torch_root()}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target}",
            *shlex.split(os.environ.get("CMAKE_ARGS", "")),
        ]
        subprocess.check_call(["cmake", "-S", source, "-B", build, "-G", "Ninja", *options])
        jobs = os.environ.get("MAX_JOBS", str(os.cpu_count()))
        subprocess.check_call(["cmake", "--build", build, "--parallel", jobs])


setup(ext_modules=[Extension("imagegen._C", [])], cmdclass={"build_ext": CMakeBuild})
