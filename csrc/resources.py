"""What the CUDA operators need of a GPU, by what ptxas said when they were built and by their machine code.

    python csrc/resources.py [--markdown docs/resources.md]

Exits with 1 where registers spill, or where a kernel for whole vectors has no 16-byte loads and stores.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
HEADING = "## CUDA operators"
_TYPES = {"f": "float", "d": "double"}


@dataclass(frozen=True)
class Resources:
    """What one kernel needs on one architecture.

    Attributes:
        kernel: name, type of its numbers, and how many it loads at once where that varies.
        architecture: ``sm_90``.
        registers, stack, spills: of a thread; the last two in bytes.
        shared: bytes of a block.
        wide, narrow: loads and stores of 16 bytes (LDG.E.128, STG.E.128), and of fewer.
    """

    kernel: str
    architecture: str
    registers: int
    stack: int
    spills: int
    shared: int
    wide: dict[str, int]
    narrow: dict[str, int]

    def faults(self) -> list[str]:
        """Why this kernel should not be shipped; empty if it may."""
        found = []
        if self.spills or self.stack:
            found.append(f"spills {self.spills} bytes, stack of {self.stack}")
        vectors = re.search(r", (\d+) at once", self.kernel)
        if vectors and int(vectors[1]) > 1:
            needed = ("LDG", "STG") if self.kernel.startswith("pixel_step") else ("LDG",)
            found += [f"no 16-byte {name}" for name in needed if not self.wide.get(name)]
        return found


def read(library: Path, said: str, cuobjdump: str) -> list[Resources]:
    """Of every kernel in `library` on every architecture; `said` is what ptxas printed (-v) when it was built."""
    instructions = _instructions(library, cuobjdump)
    found = []
    for part in said.split("Compiling entry function ")[1:]:
        name, architecture = re.findall(r"'(\w+)'", part)[:2]
        stack, stores, loads = map(
            int, _match(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", part)
        )
        words = instructions[name, architecture]
        memory = [word for word in words if word.split(".")[0] in ("LDG", "STG")]
        shared = re.search(r"(\d+) bytes smem", part)
        found.append(
            Resources(
                kernel=_readable(name),
                architecture=architecture,
                registers=int(_match(r"Used (\d+) registers", part)[0]),
                stack=stack,
                spills=stores + loads + 4 * sum(word.startswith(("LDL", "STL")) for word in words),
                shared=int(shared[1]) if shared else 0,
                wide=_count([word for word in memory if ".128" in word]),
                narrow=_count([word for word in memory if ".128" not in word]),
            )
        )
    return sorted(found, key=lambda one: (one.kernel, int(one.architecture[3:])))


def built(work: Path, nvcc: str, cuobjdump: str) -> list[Resources]:
    """Of the CUDA operators, compiled in `work` for the architectures that are shipped."""
    import build

    what = build.Plan(cxx=build.plan().cxx, nvcc=nvcc)
    (library,) = build.build(work / "lib", work, what, gpu_only=True)
    return read(library, (work / "cuda.so.txt").read_text(), cuobjdump)


def find_cuobjdump(nvcc: str) -> str | None:
    """Beside nvcc, on PATH, or where Triton brings it."""
    beside = Path(nvcc).resolve().parent / "cuobjdump"
    if beside.is_file():
        return str(beside)
    try:
        from triton import knobs

        return str(knobs.nvidia.cuobjdump.path)
    except (ImportError, AttributeError, RuntimeError):
        return shutil.which("cuobjdump")


def markdown(rows: list[Resources], compiler: str) -> str:
    """The section of ``docs/resources.md``."""
    lines = [
        HEADING,
        "",
        f"Made by `python csrc/resources.py --markdown docs/resources.md` with {compiler}. Registers and spilled bytes",
        "of a thread, bytes of shared memory of a block, 16-byte and narrower memory instructions. Nothing here was",
        "run: time is not measured.",
        "",
        "| kernel | sm | registers | spills | shared | 16-byte | narrower |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        kinds = (" ".join(f"{name} {n}" for name, n in group.items()) or "-" for group in (row.wide, row.narrow))
        cells = (row.kernel, row.architecture[3:], row.registers, row.spills, row.shared, *kinds)
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"


def _instructions(library: Path, cuobjdump: str) -> dict[tuple[str, str], list[str]]:
    code = subprocess.run([cuobjdump, "-sass", str(library)], capture_output=True, text=True, check=True).stdout
    found: dict[tuple[str, str], list[str]] = {}
    architecture = name = ""
    for line in code.splitlines():
        if match := re.match(r"\s*arch = (sm_\w+)", line):
            architecture = match[1]
        elif match := re.match(r"\s*Function : (\w+)", line):
            name = match[1]
            found[name, architecture] = []
        elif match := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@\S+\s+)?([A-Z][\w.]*)", line):
            found[name, architecture].append(match[1])
    return found


def _readable(mangled: str) -> str:
    name, kind, vector = _match(r"\d+([a-z_]+)_kernelI([fd])(?:Li(\d+))?E", mangled)
    return f"{name} {_TYPES[kind]}" + (f", {vector} at once" if vector else "")


def _match(pattern: str, text: str) -> tuple[str, ...]:
    found = re.search(pattern, text)
    if found is None:
        raise ValueError(f"nothing like {pattern!r} in {text[:200]!r}.")
    return found.groups()


def _count(words: list[str]) -> dict[str, int]:
    names = sorted(word.split(".")[0] for word in words)
    return {name: names.count(name) for name in dict.fromkeys(names)}


def main() -> None:
    import build

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--markdown", type=Path, help="replace the section of this page")
    options = parser.parse_args()
    what = build.plan()
    cuobjdump = find_cuobjdump(what.nvcc) if what.nvcc else None
    if what.nvcc is None or cuobjdump is None:
        raise SystemExit(f"nvcc and cuobjdump are needed: {'; '.join(what.lines)}")
    rows = built(HERE.parent / "build" / "resources", what.nvcc, cuobjdump)
    section = markdown(rows, build.nvcc_release(what.nvcc))
    print(section, end="")
    if options.markdown:
        page = options.markdown.read_text().split(HEADING)[0].rstrip()
        options.markdown.write_text(f"{page}\n\n{section}")
    faults = [f"{row.kernel} {row.architecture}: {fault}" for row in rows for fault in row.faults()]
    if faults:
        raise SystemExit("\n".join(faults))


if __name__ == "__main__":
    main()
