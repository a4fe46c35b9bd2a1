"""Drives CMake: metadata is in pyproject.toml, the build in CMakeLists.txt. Never imports torch."""

import os
import subprocess
import sys
import sysconfig
from importlib.util import find_spec
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
NO_TORCH = "rlekf_ext is compiled against an installed torch >= 2.11 and found none: run `pip install torch` first."


def torch_folder() -> Path:
    """The installed torch, also from pip's isolated build, which hides the environment it installs into."""
    spec = find_spec("torch")
    candidates = [
        os.environ.get("TORCH_DIR"),
        Path(spec.origin).parent if spec and spec.origin else None,
        Path(sysconfig.get_path("purelib")) / "torch",
    ]
    for folder in candidates:
        if folder and (Path(folder) / "include/torch/csrc/stable/library.h").exists():
            return Path(folder)
    sys.exit(NO_TORCH)


def torch_version(folder: Path) -> str:
    for line in (folder / "version.py").read_text().splitlines():
        if line.startswith("__version__"):
            return line.split("=")[1].strip().strip("'\"")
    return "unknown"


class CMakeBuild(build_ext):
    def run(self):
        torch = torch_folder()
        build = Path(self.build_temp).resolve()
        destination = Path(self.get_ext_fullpath("rlekf_ext._C")).resolve().parent
        # A folder left by an earlier isolated build refers to a ninja that is gone with its environment.
        (build / "CMakeCache.txt").unlink(missing_ok=True)
        configure = ["cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja"]
        configure += [f"-DTORCH_DIR={torch}", f"-DRLEKF_TORCH_VERSION={torch_version(torch)}"]
        configure += [f"-DRLEKF_VERSION={self.distribution.get_version()}", f"-DPython_EXECUTABLE={sys.executable}"]
        configure += [f"-DCMAKE_INSTALL_PREFIX={destination}", "-DCMAKE_BUILD_TYPE=Release"]
        configure += os.environ.get("CMAKE_ARGS", "").split()
        # cmake and ninja may be installed next to this Python without being on PATH.
        path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")])
        environment = {**os.environ, "PATH": path}
        print(f"rlekf_ext: building against torch {torch_version(torch)}", file=sys.stderr)
        for command in (configure, ["cmake", "--build", str(build)], ["cmake", "--install", str(build)]):
            subprocess.run(command, check=True, env=environment)


if {"dist_info", "bdist_wheel", "editable_wheel"} & set(sys.argv):
    torch_folder()  # before pip downloads what the package depends on

setup(ext_modules=[Extension("rlekf_ext._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
