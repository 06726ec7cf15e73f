"""Drives CMake; nothing else lives here."""

import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from backend import cxx_compiler, torch_folder
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext


def tool(name):
    """Where cmake or ninja is; pip puts them beside Python, which need not be on PATH."""
    return shutil.which(name, path=sysconfig.get_path("scripts")) or shutil.which(name)


def run(*command):
    if subprocess.run(command).returncode:
        raise SystemExit(
            "imagegen: the build failed, the reason is above. Where it is the CUDA compiler's, "
            "CMAKE_ARGS=-DIMAGEGEN_CUDA=OFF builds the CPU kernels alone."
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
        cmake, ninja, torch = tool("cmake"), tool("ninja"), torch_folder()
        if not (cmake and ninja and torch and importlib.util.find_spec("pybind11")):
            raise SystemExit("imagegen: building needs 'torch>=2.10' 'cmake>=3.24' ninja 'pybind11>=2.12' installed")
        target = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        source = Path(__file__).resolve().parent
        # An editable install keeps its build folder, so that the next one compiles only what changed.
        build = source / "build/editable" if self.editable_mode else Path(self.build_temp).resolve()
        build.mkdir(parents=True, exist_ok=True)
        # All that an earlier configuration may have left in CMake's cache and that is not to be inherited: tools in
        # an isolated environment that is gone, options that CMAKE_ARGS no longer names.
        options = [
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DCMAKE_MAKE_PROGRAM={ninja}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DTORCH_ROOT={torch}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target}",
            "-DIMAGEGEN_CUDA=AUTO",
            "-UCMAKE_CUDA_ARCHITECTURES",
            *shlex.split(os.environ.get("CMAKE_ARGS", "")),
        ]
        run(cmake, "-S", source, "-B", build, "-G", "Ninja", *options)
        run(cmake, "--build", build, "--parallel", os.environ.get("MAX_JOBS", str(os.cpu_count())))


setup(ext_modules=[Extension("imagegen._C", [])], cmdclass={"build_ext": CMakeBuild})
