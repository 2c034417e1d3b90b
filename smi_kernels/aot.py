"""Compiles recorded kernel launches ahead of time, for GPUs that need not be there, and reads what they will cost.

    python -m smi_kernels.aot --out resources.json

Exits with 1, naming the kernels, where registers spill, shared memory exceeds the GPU's, a 16-bit matrix product does
not run on the matrix units, or, with `SMI_PDL=1`, a kernel touches memory before it has waited for the one before it.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from smi_kernels import tuning
from smi_kernels.launch import DEPENDENT_LAUNCH, Launch, record_launches

# Most bytes of shared memory that one program can have, by compute capability: CUDA C++ Programming Guide, table of
# technical specifications.
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}

_TYPES = {
    torch.bool: "u1",
    torch.uint8: "u8",
    torch.int8: "i8",
    torch.int16: "i16",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.float64: "fp64",
}


@dataclass(frozen=True)
class Specialization:
    """All that Triton compiles a kernel for.

    Attributes:
        types: name and type of each argument.
        constants: name and value of the compile-time constants among them.
        aligned: indices of arguments that are known to be multiples of 16.
        options: ``num_warps``, ``num_stages``.
    """

    kernel: Any
    types: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    aligned: tuple[int, ...]
    options: tuple[tuple[str, int], ...]

    def __str__(self) -> str:
        """Types of the tensors in order, equal neighbours once, then tile sizes and options."""
        tensors = [of.lstrip("*") for _, of in self.types if of.startswith("*")]
        distinct = [of for before, of in zip(["", *tensors], tensors, strict=False) if of != before]
        tiles = [f"{name}={value}" for name, value in self.constants if name.isupper() and value is not None]
        return " ".join(["/".join(distinct), *tiles, *(f"{n}={v}" for n, v in self.options if n != "enable_fp_fusion")])


@dataclass(frozen=True)
class Resources:
    """What one compiled kernel needs of a GPU.

    Attributes:
        kernel, specialization: what was compiled, as text.
        capability: compute capability times 10.
        registers: of a thread.
        stack: bytes of local memory of a thread.
        spills: instructions that load from or store to local memory.
        shared: bytes of shared memory of a program.
        matrix: matrix instructions by name: HMMA, HGMMA, UTCMMA, DMMA.
        wide: 16-byte instructions by name: LDG, STG, LDGSTS; and UTMALDG, which fetch whole tiles.
        narrow: LDG, STG and LDGSTS of fewer bytes.
        early: instructions that touch global memory before the kernel has waited for the one in front of it; None where
            it was not compiled for dependent launch.
        products16: rows of the 16-bit matrix products in the source; empty if there are none.
    """

    kernel: str
    specialization: str
    capability: int
    registers: int
    stack: int
    spills: int
    shared: int
    matrix: dict[str, int]
    wide: dict[str, int]
    narrow: dict[str, int]
    early: int | None
    products16: tuple[int, ...]

    def faults(self) -> list[str]:
        """Why this kernel should not be shipped; empty if it may."""
        found = []
        if self.spills or self.stack:
            found.append(f"spills: {self.spills} instructions on {self.stack} bytes of local memory")
        if self.shared > SHARED_MEMORY[self.capability]:
            found.append(f"needs {self.shared} bytes of shared memory of {SHARED_MEMORY[self.capability]}")
        if self.early:
            found.append(f"{self.early} memory instructions before it waits for the kernel in front of it")
        # Hopper's warp-group products have 64 rows; smaller tiles run on the units that Ampere has too.
        unit = "HGMMA" if self.capability == 90 and max(self.products16, default=0) >= 64 else ""
        if self.products16 and not any(unit in name for name in self.matrix):
            found.append(f"16-bit products without {unit or 'matrix'} instructions")
        return found


def specialize(launch: Launch) -> Specialization:
    """What Triton would compile for `launch`: types, and what it makes of None, of 1 and of multiples of 16.

    Memory counts as aligned to 16 bytes, views as far as their offset is.
    """
    types, constants, aligned = [], [], []
    for index, parameter in enumerate(launch.kernel.params):
        value = launch.args.get(parameter.name, parameter.default)
        kind, multiple = _describe(value)
        general = parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (kind == "i32" and value == 1 and not general):
            types.append((parameter.name, "constexpr"))
            constants.append((parameter.name, value))
            continue
        types.append((parameter.name, parameter.annotation_type or kind))
        if multiple and not general and not parameter.do_not_specialize_on_alignment:
            aligned.append(index)
    options = tuple(sorted(launch.options.items()))
    return Specialization(launch.kernel, tuple(types), tuple(constants), tuple(aligned), options)


def _describe(value: Any) -> tuple[str, bool]:
    """Triton's name of the type of an argument, and whether it is a multiple of 16."""
    if isinstance(value, TensorDescriptor):
        return f"tensordesc<{_TYPES[value.base.dtype]}{value.block_shape}>", False
    if isinstance(value, Tensor):
        return "*" + _TYPES[value.dtype], bool(value.storage_offset() * value.element_size() % 16 == 0)
    if isinstance(value, bool):
        return "u1", False
    if isinstance(value, int):
        return "i32" if -(2**31) <= value < 2**31 else "i64", value % 16 == 0
    return "fp32", False


def compile_launch(launch: Launch, capability: int) -> Resources:
    """Compile what `launch` would run on a GPU of this compute capability (times 10) and read the machine code."""
    return _compile(specialize(launch), capability)


def _compile(wanted: Specialization, capability: int) -> Resources:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    source = ASTSource(
        fn=wanted.kernel,
        signature=dict(wanted.types),
        constexprs=dict(wanted.constants),
        attrs={(index,): [["tt.divisibility", 16]] for index in wanted.aligned},
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=dict(wanted.options))
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(compiled.asm["cubin"])
        usage, code = _cuobjdump("-res-usage", cubin), _cuobjdump("-sass", cubin)
    words = re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@\S+\s+)?([A-Z][\w.]*)", code, flags=re.MULTILINE)
    memory = [word for word in words if re.match(r"(LDG|STG|LDGSTS|UTMALDG)\b", word)]
    waits = words.index("ACQBULK") if "ACQBULK" in words else len(words)
    early = [word for word in words[:waits] if re.match(r"(LD|ST|LDG|STG|LDGSTS|ATOM\w*|RED\w*|UTMA\w+)\b", word)]
    products = re.findall(r"tt\.dot .*: tensor<(\d+)x\d+x(?:b?f16)> \*", compiled.asm["ttir"])
    return Resources(
        kernel=wanted.kernel.__name__,
        specialization=str(wanted),
        capability=capability,
        registers=int(_first(r"REG:(\d+)", usage)),
        stack=int(_first(r"STACK:(\d+)", usage)),
        spills=sum(re.match(r"(LDL|STL)\b", word) is not None for word in words),
        shared=compiled.metadata.shared,
        matrix=_count(_first(r"^(\w+)", word) for word in words if re.match(r"\w*MMA\b", word)),
        wide=_count(word.split(".")[0] for word in memory if _wide(word)),
        narrow=_count(word.split(".")[0] for word in memory if not _wide(word)),
        early=len(early) if dict(wanted.options).get("launch_pdl") else None,
        products16=tuple(sorted({int(rows) for rows in products})),
    )


def _cuobjdump(option: str, cubin: Path) -> str:
    from triton import knobs

    return subprocess.run(
        [knobs.nvidia.cuobjdump.path, option, str(cubin)], capture_output=True, text=True, check=True
    ).stdout


def _first(pattern: str, text: str) -> str:
    found = re.search(pattern, text)
    if found is None:
        raise ValueError(f"cuobjdump prints nothing like {pattern!r}.")
    return found[1]


def _wide(word: str) -> bool:
    return ".128" in word or word.startswith("UTMA")


def _count(names: Iterable[str]) -> dict[str, int]:
    listed = sorted(names)
    return {name: listed.count(name) for name in dict.fromkeys(listed)}


# --- what is shipped ---


@dataclass(frozen=True)
class Workload:
    """Sizes of an iteration: a ViT of patch 16 at 224 pixels, `kept` patches of each of `batch` images.

    With `merges` also an iteration that merges half of the patches.
    """

    width: int
    heads: int
    batch: int
    kept: int
    precision: Any
    options: tuple[tuple[str, Any], ...] = ()
    merges: bool = False


# The first `_FEW` meet every shipped tile in every arithmetic, and every GELU; all of them the widths of DeiT-Ti, -S,
# -B and ViT-L too.
WORKLOADS = [
    Workload(192, 3, 128, 46, "bf16", merges=True),
    Workload(384, 6, 128, 46, "bf16"),
    Workload(1280, 16, 2, 95, "fp16"),
    Workload(768, 12, 128, 196, "tf32", merges=True),
    Workload(384, 6, 32, 46, "fp32"),
    Workload(192, 3, 2, 46, "tf32"),
    Workload(384, 6, 128, 46, "bf16", (("act_layer", "quick_gelu"), ("pre_norm", True))),
    Workload(384, 6, 128, 46, "bf16", (("act_layer", "gelu_tanh"), ("global_pool", "map"), ("class_token", False))),
    Workload(768, 12, 32, 196, "bf16", (("qk_norm", True),), merges=True),
    Workload(1024, 16, 128, 137, "bf16", merges=True),
    Workload(768, 12, 32, 196, "fp32", merges=True),
]
_FEW = 8
# What is left of a matrix kernel where the vendor's library makes the product: by what operands and sums are.
_WITH_VENDOR = [WORKLOADS[0], WORKLOADS[4]]
# What no table has yet, but the tuner tries: operands that are fetched in whole tiles.
_FETCHED = {90: tuning.Tile(128, 128, 64, 8, 3, "tma", 2), 100: tuning.Tile(128, 128, 64, 8, 3, "tma")}


def _run(w: Workload) -> None:
    """All kernels at one workload: an iteration, ranking, and what only the autograd layer and single operations
    use."""
    import timm.models.vision_transformer as timm

    import smi_kernels
    from smi_kernels.patch_embed.kernels import patches_to_pixels

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    options = {"embed_dim": w.width, "depth": 3 if w.merges else 2, "num_heads": w.heads, **dict(w.options)}
    with torch.device("meta"):
        vit = smi_kernels.SparseViT.from_timm(timm.VisionTransformer(**options), w.precision)
    images, keep = empty(w.batch, 3, 224, 224), empty(w.batch, w.kept, dtype=torch.int64)
    targets, table = empty(w.batch, dtype=torch.int64), empty(9, w.batch, 3, dtype=torch.int64)
    descent = smi_kernels.PixelDescent(
        vit, images, targets, table, low=empty(3), high=empty(3), tv1=1.0, tv2=1.0, l2=1.0
    )
    if w.kept < vit.weights.position.shape[0]:
        descent.prune(keep)
    descent.advance(1)
    descent.rank(w.kept // 2)
    if w.kept < vit.weights.position.shape[0]:
        loss = lambda images, logits, *_: images.mean() + logits.mean()  # noqa: E731
        descent = smi_kernels.PixelDescent(vit, images, targets, table, low=empty(3), high=empty(3), loss=loss)
        descent.prune(keep)
        descent.advance(1)

    if w.merges:
        vit.merge_to = 0.5
        trace = vit.run(images, keep, None)
        vit.backward_of(trace, trace.parts.sum(0))

    d_patches = empty(w.batch, w.kept, 3 * 16 * 16)
    patches_to_pixels(d_patches, keep, table[0], 224, 224, 16, 16)
    smi = torch.ops.smi
    smi.prior_sums_dx(images, empty(w.batch, 3, 9))
    smi.prior_coefficients(empty(w.batch, 3, 9), 1.0, 1.0, 1.0, 1, 224, 224)
    smi.select_tokens(empty(w.batch, w.kept), keep, w.kept // 2)
    key = empty(w.batch, w.heads, 1 + w.kept, w.width // w.heads, dtype=vit.weights.low)
    smi.attention_row(key[:, :, 0], key, 0.125)
    adam = {"step": 1, "lr": 0.25, "beta1": 0.5, "beta2": 0.99, "eps": 1e-8, "low": empty(3), "high": empty(3)}
    smi.adam_clamp_(images, images, images, images, **adam)


def shipped_launches(capability: int, few: bool = False) -> list[Launch]:
    """One launch of everything that Triton would compile for `WORKLOADS`, or for the first few, on such a GPU."""
    with record_launches() as launches, tuning.assuming(capability):
        for workload in WORKLOADS[: (1 if DEPENDENT_LAUNCH else _FEW) if few else None]:
            _run(workload)
        for workload in _WITH_VENDOR:
            with tuning.forcing(tuning.VENDOR):
                _run(workload)
        if capability in _FETCHED:
            with tuning.forcing(_FETCHED[capability]):
                _run(WORKLOADS[0])
    return list({specialize(launch): launch for launch in reversed(launches)}.values())[::-1]


# --- the command ---


def compile_all(launches: Mapping[int, Sequence[Launch]], jobs: int) -> list[Resources]:
    """Each distinct specialization once for the capability that it is listed under, in `jobs` processes."""
    wanted = [(of, capability) for capability, each in launches.items() for of in dict.fromkeys(map(specialize, each))]
    # Kernels cannot be pickled; forked processes have them already, and ask only for the number of their task.
    with multiprocessing.get_context("fork").Pool(jobs, _set_tasks, (wanted,)) as pool:
        return pool.map(_compile_task, range(len(wanted)), chunksize=1)


_tasks: list[tuple[Specialization, int]] = []


def _set_tasks(wanted: list[tuple[Specialization, int]]) -> None:
    _tasks[:] = wanted


def _compile_task(number: int) -> Resources:
    return _compile(*_tasks[number])


def _table(rows: Sequence[Resources]) -> str:
    head = ("kernel", "sm", "regs", "spills", "shared", "matrix", "16 bytes", "narrower", "compiled for")
    cells = [
        (
            row.kernel,
            str(row.capability),
            str(row.registers),
            str(row.spills),
            str(row.shared),
            *(
                " ".join(f"{name}:{n}" for name, n in kinds.items()) or "-"
                for kinds in (row.matrix, row.wide, row.narrow)
            ),
            row.specialization,
        )
        for row in rows
    ]
    widths = [max(map(len, column)) for column in zip(head, *cells, strict=True)]
    lines = ("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in (head, *cells))
    return "\n".join(lines)


def markdown(rows: Sequence[Resources]) -> str:
    """The page `docs/resources.md`."""
    import triton

    lines = [
        "# What the kernels need of a GPU",
        "",
        f"Made by `python -m smi_kernels.aot --few --markdown docs/resources.md` with triton {triton.__version__}:",
        "every kernel at the shipped tiles, compiled ahead of time. Registers of a thread, instructions that spill,",
        "kilobytes of shared memory, matrix instructions, memory instructions of 16 bytes (UTMALDG: whole tiles) and",
        "narrower ones. Nothing here was run.",
        "",
        "| kernel | sm | registers | spills | shared KB | matrix | 16-byte | narrower | compiled for |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        groups = (row.matrix, row.wide, row.narrow)
        kinds = (" ".join(f"{name} {n}" for name, n in group.items()) or "-" for group in groups)
        cells = (row.kernel, row.capability, row.registers, row.spills, round(row.shared / 1024, 1), *kinds)
        lines.append(f"| {' | '.join(map(str, cells))} | {row.specialization} |")
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m smi_kernels.aot", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--capability", type=int, action="append", choices=sorted(SHARED_MEMORY), help="default: all")
    parser.add_argument("--few", action="store_true", help="the workloads that meet every shipped tile, not all")
    parser.add_argument("--kernel", default="", help="only kernels whose name contains this")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="processes; default: one a core")
    parser.add_argument("--out", type=Path, help="write all figures to this JSON file")
    parser.add_argument("--markdown", type=Path, help="write the table to this page")
    options = parser.parse_args(argv)
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1 is set, and interpreted kernels cannot be compiled; unset it.")
    capabilities = [c for c in options.capability or sorted(SHARED_MEMORY) if c >= 90 or not DEPENDENT_LAUNCH]
    launches = {c: [of for of in shipped_launches(c, options.few) if options.kernel in of.name] for c in capabilities}
    rows = compile_all(launches, options.jobs)
    print(_table(rows))
    if options.out:
        options.out.write_text(
            json.dumps([{**dataclasses.asdict(row), "faults": row.faults()} for row in rows], indent=1)
        )
    if options.markdown:
        old = options.markdown.read_text() if options.markdown.is_file() else ""
        _, heading, rest = old.partition("\n## ")  # of csrc/resources.py
        options.markdown.write_text(markdown(rows) + heading + rest)
    faulty = [row for row in rows if row.faults()]
    for row in faulty:
        print(f"{row.kernel} sm_{row.capability} ({row.specialization}): {'; '.join(row.faults())}", file=sys.stderr)
    if faulty:
        sys.exit(1)


if __name__ == "__main__":
    main()
