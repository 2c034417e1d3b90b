"""Builds the native operators of csrc/ beside the package, which pyproject.toml describes; csrc/build.py knows how."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "csrc"))
import build as native  # noqa: E402

PLAN = native.plan()
FOLDER = Path("smi_kernels", "_native")


class BuildNative(build_ext):
    """All libraries at once, by ninja; what has not changed since the last time is not compiled again."""

    def run(self) -> None:
        print(*PLAN.lines, sep="\n", flush=True)
        here = ROOT if self.inplace or self.editable_mode else Path(self.build_lib)
        try:
            self._made = native.build(here / FOLDER, ROOT / "build" / "native", PLAN)
        except subprocess.CalledProcessError:
            raise SystemExit(
                "The native operators do not compile here, see above. SMI_NATIVE=0 installs without them, "
                "SMI_NATIVE=cpu without those for GPUs."
            ) from None

    def get_outputs(self) -> list[str]:
        return [str(path) for path in getattr(self, "_made", [])]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


class PlatformWheel(bdist_wheel):
    """The libraries know nothing of Python, so one wheel of a platform serves every version."""

    def get_tag(self) -> tuple[str, str, str]:
        python, abi, system = super().get_tag()
        return ("py3", "none", system) if PLAN.cxx else (python, abi, system)


setup(
    # Without sources: it only says that this package is not pure Python.
    ext_modules=[Extension("smi_kernels._native", [])] if PLAN.cxx else [],
    cmdclass={"build_ext": BuildNative, "bdist_wheel": PlatformWheel},
)
