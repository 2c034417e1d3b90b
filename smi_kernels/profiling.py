"""What the operators of a piece of code cost: how often they are called, what they move, compute and take.

Operators are recorded while the code runs, and each distinct call is then timed by itself, many times over: on a GPU
replayed as a CUDA graph, so that neither the host nor a profiler's interference counts. In place they may find their
operands in the cache sooner or later than that.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from smi_kernels.launch import count_launches


@dataclass
class Operation:
    """All calls of one operator with operands of the same shapes and dtypes, and the same options.

    Attributes:
        name: of the operator.
        shape: of its largest operand, for people.
        calls: how many there were.
        flops: floating-point operations of one call in matrix products; a multiplication and an addition are two.
        bytes: that one call has to move at least: every operand read once, every result written once.
        seconds: of one call, median; 0 before `measure`.
        kernels: names of the Triton kernels it launches.
        registers, shared: of the kernel with most: registers of a thread, bytes of shared memory; 0 if not known.
        arguments: of the first call, by name; what it writes to is copied.
    """

    name: str
    shape: tuple[int, ...]
    calls: int
    flops: int
    bytes: int
    seconds: float = 0.0
    kernels: tuple[str, ...] = ()
    registers: int = 0
    shared: int = 0
    arguments: dict[str, Any] = field(repr=False, compare=False, default_factory=dict)
    function: Any = field(repr=False, compare=False, default=None)

    def body(self) -> Any:
        """The call once more."""
        return self.function(**self.arguments)

    def again(self, dtype: torch.dtype | None = None) -> list[Tensor]:
        """All that the call makes or changes, on fresh copies; computed in `dtype` if that is given."""
        arguments = {name: _cast(value, dtype) for name, value in self.arguments.items()}
        made = self.function(**arguments)
        changed = [arguments[name] for name in _written(self.function) if arguments.get(name) is not None]
        return [*(made if isinstance(made, tuple) else () if made is None else (made,)), *changed]

    def measure(self, device: torch.device, repeats: int = 20, rounds: int = 5) -> None:
        """Fill in `seconds` and, for kernels, what they need."""
        with count_launches() as launches:
            self.body()
        self.kernels = tuple(launch.name for launch in launches)
        compiled = [launch.compiled for launch in launches if hasattr(launch.compiled, "n_regs")]
        self.registers = max((kernel.n_regs for kernel in compiled), default=0)
        self.shared = max((kernel.metadata.shared for kernel in compiled), default=0)
        self.seconds = statistics.median(timed(self.body, device, repeats, rounds))


@contextlib.contextmanager
def record_operations() -> Iterator[list[Operation]]:
    """Within this context every operator of ``torch.ops.smi`` is listed, and runs; in order of the first call."""
    recorder = _Recorder()
    with recorder:
        yield recorder.operations


def timed(body: Callable[[], object], device: torch.device, repeats: int = 20, rounds: int = 5) -> list[float]:
    """Seconds of one `body`, in each of `rounds` rounds of `repeats` calls; on a GPU as a CUDA graph of them."""
    if device.type != "cuda":
        body()
        return [_timed_here(body, repeats) for _ in range(rounds)]
    from smi_kernels.graphs import Graph

    body()

    def several() -> None:
        for _ in range(repeats):
            body()

    graph = Graph(several, device)
    seconds = []
    with torch.cuda.device(device):  # on whose stream events have to be recorded
        for _ in range(rounds):
            graph.replay()  # which keeps the device busy until the host has launched what is timed
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            seconds.append(start.elapsed_time(end) / 1e3 / repeats)
    return seconds


def _timed_here(body: Callable[[], object], repeats: int) -> float:
    began = time.perf_counter()
    for _ in range(repeats):
        body()
    return (time.perf_counter() - began) / repeats


def ceilings(device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """What this machine reaches: bytes a second of a copy (read and written), operations a second of a matrix product.

    Of random numbers, because zeros take less power and clocks rise.
    """
    big = device.type == "cuda"
    numbers = torch.randn((256 if big else 32) * 2**20 // 4, device=device)
    to = torch.empty_like(numbers)
    copied = 2 * numbers.nbytes / min(timed(lambda: to.copy_(numbers), device, 5 if big else 2))
    n = 8192 if big else 1024
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    multiplied = 2 * n**3 / min(timed(lambda: torch.mm(a, b), device, 10 if big else 2))
    return copied, multiplied


@contextlib.contextmanager
def proton(name: str) -> Iterator[None]:
    """Within this context Triton's own profiler watches kernels; it writes ``<name>.hatchet`` for ``proton-viewer``."""
    from triton import profiler

    profiler.start(name, hook="triton")
    try:
        yield
    finally:
        profiler.finalize()


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.operations: list[Operation] = []
        self._known: dict[Any, Operation] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        made = func(*args, **kwargs)
        if func.namespace != "smi":
            return made
        given = _by_name(func, args, kwargs)
        key = (func, *((argument, _kind(argument, value)) for argument, value in sorted(given.items())))
        if key not in self._known:
            name = func._schema.name.removeprefix("smi::")
            self._known[key] = Operation(
                name,
                max((tuple(value.shape) for value in given.values() if isinstance(value, Tensor)), key=prod),
                0,
                FLOPS.get(name, lambda *_: 0)(*args),
                _bytes(func, given, made),
                arguments=_own(func, given),
                function=func,
            )
            self.operations.append(self._known[key])
        self._known[key].calls += 1
        return made


def _by_name(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    return dict(zip((argument.name for argument in func._schema.arguments), args, strict=False)) | kwargs


def _kind(argument: str, value: Any) -> Any:
    """What the work of a call depends on: not on entries of tensors, nor on numbers that go into the arithmetic."""
    if isinstance(value, Tensor):
        return tuple(value.shape), value.dtype
    return None if isinstance(value, float) or argument == "step" else value


def _written(func: Any) -> list[str]:
    """Names of the arguments that the operator changes."""
    return [a.name for a in func._schema.arguments if a.alias_info is not None and a.alias_info.is_write]


def _own(func: Any, given: dict[str, Any]) -> dict[str, Any]:
    """The same arguments, with copies of what is written to, so that measuring leaves no trace."""
    written = _written(func)
    return {k: v.clone() if k in written and isinstance(v, Tensor) else v for k, v in given.items()}


def _cast(value: Any, dtype: torch.dtype | None) -> Any:
    if isinstance(value, Tensor):
        return value.to(dtype, copy=True) if dtype is not None and value.is_floating_point() else value.clone()
    if isinstance(value, torch.dtype) and dtype is not None:
        return dtype
    return value


def _bytes(func: Any, given: dict[str, Any], made: Any) -> int:
    name, written = func._schema.name.removeprefix("smi::"), _written(func)
    total = sum(t.nbytes for t in (made if isinstance(made, tuple) else (made,)) if isinstance(t, Tensor))
    for argument, tensor in given.items():
        if not isinstance(tensor, Tensor) or argument in ("table", "history"):
            continue  # of tables an iteration touches one row
        if (name, argument) == ("finish_prior_sums", "images"):
            continue  # a few borders at most
        size = tensor.nbytes
        if (name, argument) == ("embed_tokens", "images") and given["keep"] is not None:
            size = size * given["keep"].shape[1] // given["position"].shape[0]  # kept patches alone are read
        total += size * (2 if argument in written else 1)
    return total


def _product(rows: Tensor, weight: Tensor) -> int:
    return 2 * rows.shape[0] * weight.numel()


def _attention(qkv: Tensor, products: int) -> int:
    B, N, _, H, d = qkv.shape
    return 2 * products * B * H * N * N * d


def _class_attention(query: Tensor, kv: Tensor, products: int) -> int:
    return 2 * products * query.numel() * kv.shape[1]


FLOPS: dict[str, Callable[..., int]] = {
    "attention": lambda qkv, *_: _attention(qkv, 2),
    "attention_dx": lambda qkv, *_: _attention(qkv, 5),  # scores again, and four products
    "class_attention": lambda query, kv, *_: _class_attention(query, kv, 2),
    "class_attention_dx": lambda query, kv, *_: _class_attention(query, kv, 5),
    "embed_tokens": lambda images, keep, offsets, weight, position, *_: (
        2 * images.shape[0] * (position.shape[0] if keep is None else keep.shape[1]) * weight.numel()
    ),
    "embed_tokens_dx": lambda dx, weight, prefix, *_: 2 * dx.shape[0] * (dx.shape[1] - prefix) * weight.numel(),
    "linear_dx": lambda dy, weight, *_: _product(dy, weight),
    "linear_gelu_dx": lambda dy, weight, *_: _product(dy, weight),
    "linear_residual": lambda a, weight, *_: _product(a, weight),
    "norm_linear": lambda x, stats, weight, *_: _product(x, weight),
    "norm_linear_dx": lambda du, weight, *_: _product(du, weight),
    "norm_linear_gelu": lambda x, stats, weight, *_: _product(x, weight),
}
