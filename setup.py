"""Builds zfcore._C with CMake. Never imports torch: the kernels are free of it.

Environment: ZFCORE_CUDA=AUTO|ON|OFF, ZFCORE_CUDA_ARCHITECTURES (a CMake list), ZFCORE_THREADS=openmp|std,
ZFCORE_SANITIZE (for example address,undefined), ZFCORE_BUILD_DIR (keeps the build tree between builds).
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CMAKE_OPTIONS = ("ZFCORE_CUDA", "ZFCORE_CUDA_ARCHITECTURES", "ZFCORE_THREADS", "ZFCORE_SANITIZE")


class CMakeBuild(build_ext):
    def build_extension(self, ext):
        import pybind11

        target = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        build = Path(os.environ.get("ZFCORE_BUILD_DIR") or Path(self.build_temp) / "cmake").resolve()
        build.mkdir(parents=True, exist_ok=True)
        target.mkdir(parents=True, exist_ok=True)
        configure = [
            "cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DZFCORE_VERSION={self.distribution.get_version()}",
        ]  # fmt: skip
        ninja = shutil.which("ninja")
        if ninja:  # given anew each time: a kept build tree remembers that of an isolated environment, now gone
            configure.append(f"-DCMAKE_MAKE_PROGRAM={ninja}")
        for name in CMAKE_OPTIONS:  # unset: the default again, not what an earlier build of this tree was given
            configure.append(f"-D{name}={os.environ[name]}" if os.environ.get(name) else f"-U{name}")
        subprocess.run(configure, check=True)
        subprocess.run(["cmake", "--build", str(build), "--parallel", str(os.cpu_count() or 1)], check=True)


setup(
    packages=[*find_packages(include=["zfcore", "zfcore.*"]), "zfcore.kernels"],
    package_dir={"zfcore.kernels": "kernels"},
    package_data={"zfcore.data": ["assets/*", "assets/**/*"], "zfcore.report": ["*.css", "*.html"]},
    include_package_data=False,
    ext_modules=[Extension("zfcore._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
