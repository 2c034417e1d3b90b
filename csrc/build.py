"""How the native operators are built: compilers, flags, targets. setup.py, make and the tests all ask here.

    python csrc/build.py --out DIR [--sanitize | --emulate]

One library for each instruction set of the CPU, so that one build runs everywhere and at full speed, and one for NVIDIA
GPUs where there is nvcc. None of them includes or links PyTorch: addresses and sizes come from Python.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import platform
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parent
# Those of x86-64 that PyTorch tells apart, whose names `torch.backends.cpu.get_cpu_capability` gives.
INSTRUCTION_SETS = {
    "default": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": [f"-mavx512{part}" for part in ("f", "cd", "bw", "dq", "vl")] + ["-mfma", "-mprefer-vector-width=512"],
}
WARNINGS = ["-Wall", "-Wextra", "-Werror"]
CXX_FLAGS = [
    *("-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden"),
    "-fopenmp-simd",  # vectors alone; threads are PyTorch's
    *("-fno-math-errno", "-fno-trapping-math"),  # or roots and comparisons could not be vectors
    *WARNINGS,
]
SANITIZE = ["-g", "-fno-omit-frame-pointer", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
EMULATE = [
    *("-std=c++20", "-O1", "-g", "-fPIC", "-pthread", "-fvisibility=hidden", "-DSMI_EMULATE"),
    *WARNINGS,
    "-Wno-unknown-pragmas",  # loops to unroll
]
ARCHITECTURES = "8.0;9.0;10.0+PTX"
NVCC_FLAGS = [
    *("-std=c++17", "-O3", "--threads", "0", "-Xcompiler", "-fPIC,-fvisibility=hidden,-Wall,-Wextra,-Werror"),
    *("--Werror", "all-warnings", "-Xptxas", "-v,--warn-on-spills"),
]


@dataclass
class Plan:
    """What will be built.

    Attributes:
        cxx, nvcc: paths of the compilers, or None.
        lines: the decision in words, a line each.
    """

    cxx: str | None
    nvcc: str | None
    lines: list[str] = field(default_factory=list)


def plan() -> Plan:
    """What can be built here. ``SMI_NATIVE=0`` builds nothing, ``SMI_NATIVE=cpu`` nothing for GPUs."""
    wanted = os.environ.get("SMI_NATIVE", "")
    if wanted not in ("", "0", "cpu"):
        raise SystemExit(f"SMI_NATIVE is {wanted!r}; expected 0 (build nothing), cpu, or nothing at all.")
    if wanted == "0":
        return Plan(None, None, ["native operators: none, SMI_NATIVE is 0"])
    found = Plan(_cxx(), None)
    if found.cxx is None:
        found.lines.append("native operators: none, no C++ compiler (c++, g++, clang++ or $CXX) on PATH")
        return found
    found.lines.append(f"native operators for CPUs: {', '.join(instruction_sets())} by {found.cxx}")
    if not list((HERE / "cuda").glob("*.cu")):
        return found
    found.nvcc = None if wanted == "cpu" else _nvcc()
    found.lines.append(
        f"native operators for GPUs: {' '.join(architectures(found.nvcc))} by {found.nvcc}"
        if found.nvcc
        else "native operators for GPUs: none, "
        + ("SMI_NATIVE is cpu" if wanted else "no nvcc in CUDA_HOME or on PATH")
    )
    return found


def instruction_sets() -> dict[str, list[str]]:
    """Name -> flags, of this machine's architecture."""
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    return INSTRUCTION_SETS if x86 else {"default": []}


def architectures(nvcc: str) -> list[str]:
    """Flags of nvcc for those of ``TORCH_CUDA_ARCH_LIST`` (else of 8.0, 9.0 and 10.0) that it knows."""
    known = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout.split()
    flags = []
    for entry in (os.environ.get("TORCH_CUDA_ARCH_LIST") or ARCHITECTURES).replace(" ", ";").split(";"):
        number, _, ptx = entry.partition("+")
        name = number.replace(".", "")
        if not entry or f"compute_{name.rstrip('af')}" not in known:
            continue
        flags.append(f"-gencode=arch=compute_{name},code=sm_{name}")
        if ptx == "PTX":
            flags.append(f"-gencode=arch=compute_{name},code=compute_{name}")
    if not flags:
        raise SystemExit(f"{nvcc} knows none of the architectures asked for; it knows {' '.join(known)}.")
    return flags


def sources_hash() -> str:
    """Of everything in this folder that is compiled, so that a library knows what it was made from."""
    digest = hashlib.sha256()
    for path in sorted(HERE.rglob("*")):
        if path.suffix in (".h", ".cuh", ".cpp", ".cu"):
            digest.update(f"{path.relative_to(HERE).as_posix()}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def build(out: Path, work: Path, what: Plan, sanitize: bool = False, gpu_only: bool = False) -> list[Path]:
    """Bring the libraries in `out` up to date; what was compiled from the same sources in `work` is not compiled again.

    Raises:
        subprocess.CalledProcessError: the compiler failed, and said why.
    """
    if what.cxx is None:
        return []
    work.mkdir(parents=True, exist_ok=True)
    out.mkdir(parents=True, exist_ok=True)
    defines = [f'-DSMI_SOURCES=\\"{sources_hash()}\\"', f'-DSMI_COMPILER=\\"{_version(what.cxx)}\\"']
    cxx = " ".join([*CXX_FLAGS, *(SANITIZE if sanitize else []), *defines])
    static = "" if sanitize or platform.system() == "Darwin" else "-static-libgcc -static-libstdc++"
    lines = [
        "ninja_required_version = 1.5",
        "rule cxx",
        f"  command = {what.cxx} {cxx} $flags -MMD -MF $out.d -shared $in -o $out {static}",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = $out",
    ]
    made = []
    for name, flags in ({} if gpu_only else instruction_sets()).items():
        made.append(f"cpu_{name}.so")
        lines += [f"build {made[-1]}: cxx {HERE / 'cpu' / 'operators.cpp'}", f"  flags = {' '.join(flags)}"]
    if what.nvcc:
        compiler = f'-DSMI_COMPILER=\\"{nvcc_release(what.nvcc).replace(" ", "_")}\\"'
        nvcc = " ".join([*NVCC_FLAGS, *architectures(what.nvcc), defines[0], compiler])
        lines += [
            "rule nvcc",
            # What ptxas says of registers and spills is kept: the resource table is made of it.
            f"  command = {what.nvcc} {nvcc} -MD -MF $out.d -shared $in -o $out 2> $out.txt || (cat $out.txt; exit 1)",
            "  depfile = $out.d",
            "  deps = gcc",
            "  description = $out",
        ]
        made.append("cuda.so")
        lines.append(f"build {made[-1]}: nvcc {HERE / 'cuda' / 'operators.cu'}")
    (work / "build.ninja").write_text("\n".join(lines) + "\n", encoding="utf-8")
    subprocess.run([_ninja(), "-C", str(work), "--quiet"], check=True)
    for old in out.glob("*.so"):
        old.unlink()  # never written over: a running process may have it mapped
    return [Path(shutil.copy2(work / name, out / name)) for name in made]


def build_emulated(out: Path, cxx: str, races: str | None = None) -> Path:
    """The CUDA operators as a library for the host, threads for threads (csrc/cuda/emulate.h). For tests alone.

    Args:
        cxx: a compiler of C++20.
        races: instead a program that runs every kernel under this sanitizer, ``thread`` or ``address``.

    Raises:
        subprocess.CalledProcessError: the compiler failed, and said why.
    """
    out.mkdir(parents=True, exist_ok=True)
    path = out / (f"cuda_{races}_{sources_hash()}" if races else f"cuda_emulated_{sources_hash()}.so")
    if path.is_file():
        return path
    made = path.with_suffix(f".{os.getpid()}")
    kind = [f"-fsanitize={races}", "-fno-omit-frame-pointer"] if races else ["-shared"]
    defines = [f'-DSMI_SOURCES="{sources_hash()}"', f'-DSMI_COMPILER="{_version(cxx)}"']
    source = HERE / "cuda" / ("races.cpp" if races else "operators.cu")
    subprocess.run([cxx, *EMULATE, *kind, *defines, "-x", "c++", str(source), "-o", str(made)], check=True)
    os.replace(made, path)
    for old in out.glob(path.name.replace(sources_hash(), "*")):
        if old != path:
            old.unlink()
    return path


def _cxx() -> str | None:
    names = (os.environ.get("CXX"), "c++", "g++", "clang++")
    return next((path for name in names if name and (path := shutil.which(name))), None)


def _nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    path = Path(home, "bin", "nvcc")
    return str(path) if path.is_file() else shutil.which("nvcc")


def _ninja() -> str:
    try:
        import ninja

        return str(Path(ninja.BIN_DIR) / "ninja")
    except ImportError:
        found = shutil.which("ninja")
        if found is None:
            raise SystemExit("ninja is missing, which builds the native operators: pip install ninja.") from None
        return found


def _version(compiler: str) -> str:
    """First line of what a compiler says of itself, fit for a command line."""
    said = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
    return "".join(c if c.isalnum() or c in ".+-" else "_" for c in said.splitlines()[0])


def nvcc_release(nvcc: str) -> str:
    """``nvcc V13.0.88``."""
    said = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout.splitlines()
    release = next((line for line in said if "release" in line), said[-1]).split(",")[-1].strip()
    return f"nvcc {release}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the libraries")
    parser.add_argument("--sanitize", action="store_true", help="with AddressSanitizer and UndefinedBehaviorSanitizer")
    parser.add_argument("--emulate", action="store_true", help="only the CUDA operators, for the host: tests")
    options = parser.parse_args()
    what = plan()
    if options.emulate:
        if what.cxx is None:
            raise SystemExit("; ".join(what.lines))
        print(build_emulated(options.out, what.cxx))
        return
    print(*what.lines, sep="\n")
    work = HERE.parent / "build" / ("sanitized" if options.sanitize else "native")
    for path in build(options.out, work, what, options.sanitize):
        print(path)


if __name__ == "__main__":
    main()
