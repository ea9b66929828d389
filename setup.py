"""Compile cython_extensions/NAME.pyx to anomdx.NAME; everything else about the package is in pyproject.toml."""
import os
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

OPENMP = {"win32": (["/openmp"], []), "darwin": (["-Xpreprocessor", "-fopenmp"], ["-lomp"])}   # (compiler, linker) flags
REQUIRED = os.environ.get("ANOMDX_REQUIRE_EXT") == "1"   # release wheels: no extension is an error


class BuildWithOpenMP(build_ext):
    "Try OpenMP, then plain C. An optional extension that fails both is left out: the package runs on NumPy and PyTorch."

    def build_extension(self, ext):
        ext.extra_compile_args, ext.extra_link_args = OPENMP.get(sys.platform, (["-fopenmp"], ["-fopenmp"]))
        try: return super().build_extension(ext)
        except Exception as error: self.warn(f"{ext.name}: no OpenMP here ({error}), building without it")
        ext.extra_compile_args, ext.extra_link_args = [], []
        super().build_extension(ext)


sources = sorted(Path("cython_extensions").glob("*.pyx"))
setup(cmdclass={"build_ext": BuildWithOpenMP},
    ext_modules=[Extension(f"anomdx.{p.stem}", [p.as_posix()], optional=not REQUIRED) for p in sources])
