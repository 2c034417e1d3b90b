"""Data-free knowledge transfer: a student learns from synthetic images what the teacher says of them.

Hu et al., ICML 2024, section 4.2: a fresh batch is inverted for every round of learning (`Synthesis`). Or offline: the
images are there, in a pool, and the student sees them many times. It is taught the teacher's logits by the divergence
of softened distributions (Hinton et al., "Distilling the Knowledge in a Neural Network", 2015). A Vision Transformer is
fed the kept patches alone, as the teacher was; any other network sees the image with something in place of the dropped
ones.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors import safe_open
from safetensors.torch import save
from timm.data import resolve_model_data_config
from torch import Tensor, nn
from torch.nn import functional as F

from smi.adapters.timm import for_channels
from smi.adapters.timm_feed import TokenFeed
from smi.dataset import Fill
from smi.devices import resolve_device
from smi.errors import SmiError, did_you_mean
from smi.files import atomic_write, check_inside, check_own, remove_temps, writing
from smi.lessons import Lessons, Live, Stored, Synthesis
from smi.pool import Pool
from smi.state import ModelInfo
from smi.workers import Workers

Mode = Literal["probe", "finetune"]
Tokens = Literal["auto", "kept", "all"]
Optimizer = Literal["adamw", "sgd"]
_SEEDS = 2**43  # of which each has streams of its own for a million epochs
_BEST, _LAST, _RECORD = "student.safetensors", "last.safetensors", "transfer.json"


@dataclass(frozen=True)
class TransferConfig:
    """How a student is taught; two runs with one config, pool and student give the same weights.

    Attributes:
        mode: ``probe`` trains the classifier alone, ``finetune`` everything.
        tokens: ``kept`` feeds a Vision Transformer the kept patches, ``all`` the filled image; ``auto`` takes kept
            wherever the student is a Vision Transformer on the pool's patch grid.
        fill: what stands in dropped patches where they are seen.
        epochs: looks at the images held out; with a `Synthesis`, batches made to learn from.
        passes: over the images of an epoch, before the next look.
        batch_size: images a step.
        optimizer: ``adamw``, or ``sgd`` with momentum 0.9 (the paper's).
        learning_rate: at the start, falling to 0 along a cosine; None is 1e-2 for ``probe`` and 5e-4 for ``finetune``,
            and 0.1 for SGD (the paper's).
        weight_decay: of the optimizer; 1e-4 in the paper.
        temperature: T of the softened distributions.
        holdout: share of a pool's images that are never trained on; the best student is chosen by them.
        seed: of the split, the order of images, and dropout; below 2^43.
    """

    mode: Mode = "probe"
    tokens: Tokens = "auto"
    fill: Fill = "mean"
    epochs: int = 50
    passes: int = 1
    batch_size: int = 64
    optimizer: Optimizer = "adamw"
    learning_rate: float | None = None
    weight_decay: float = 0.0
    temperature: float = 20.0
    holdout: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        for name, kind in (("mode", Mode), ("tokens", Tokens), ("fill", Fill), ("optimizer", Optimizer)):
            value, allowed = getattr(self, name), get_args(kind)
            if value not in allowed:
                raise SmiError(
                    f"{name} is {value!r}; expected one of {', '.join(allowed)}.{did_you_mean(str(value), allowed)}"
                )
        for name in ("epochs", "passes", "batch_size"):
            if getattr(self, name) < 1:
                raise SmiError(f"{name} is {getattr(self, name)}; expected at least 1.")
        for name in ("learning_rate", "temperature"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise SmiError(f"{name} is {value}; expected a positive number.")
        if not (math.isfinite(self.weight_decay) and self.weight_decay >= 0):
            raise SmiError(f"weight_decay is {self.weight_decay}; expected 0 or a positive number.")
        if not 0 <= self.seed < _SEEDS:
            raise SmiError(f"seed is {self.seed}; expected a whole number from 0, below {_SEEDS}.")
        if not 0 < self.holdout < 1:
            raise SmiError(f"holdout is {self.holdout}; expected a share between 0 and 1.")

    @property
    def rate(self) -> float:
        """The learning rate at the start."""
        return self.learning_rate or (0.1 if self.optimizer == "sgd" else {"probe": 1e-2, "finetune": 5e-4}[self.mode])


@dataclass(frozen=True)
class Epoch:
    """One pass: mean divergence on the images trained on and held out, and how often both say the same class."""

    loss: float
    holdout_loss: float
    agreement: float


@dataclass
class Transfer:
    """What `teach` returns.

    Attributes:
        path: the folder, with ``student.safetensors`` (a plain state dict of the best student), ``transfer.json``, and
            ``last.safetensors``, from which an interrupted run goes on.
        curve: every epoch.
        best: number of the epoch whose student was kept, from 0: of highest agreement, then of lowest loss.
        fed: ``kept`` or ``all``.
    """

    path: Path
    curve: list[Epoch]
    best: int
    fed: str


def teach(
    student: nn.Module,
    images: Pool | str | Path | Synthesis,
    out: str | Path,
    config: TransferConfig | None = None,
    *,
    name: str = "",
    device: str | torch.device = "auto",
    progress: Callable[[int, Epoch], None] | None = None,
) -> Transfer:
    """Teach `student` what the teacher says of the images; goes on where an earlier call was interrupted.

    Args:
        student: a timm model, or any that maps (B, C, H, W) to (B, classes) and, for ``probe``, has
            ``get_classifier``. It is trained in place, on `device`, and left in evaluation mode.
        images: a pool of any strategy, for which the teacher itself is not needed; or a `smi.Synthesis`, which makes a
            fresh batch for every epoch.
        out: folder for the results.
        name: of the student, for the record.
        progress: called with the number of each finished epoch and what it brought.

    Raises:
        SmiError: classes that differ from the teacher's, an input size that does not fit, a pool with too few images,
            a folder that holds another run or anything else, or a `smi.Synthesis` where another run is at work on the
            same folder.
    """
    config, device = config or TransferConfig(), resolve_device(device)
    out = Path(out)
    check_own(out, "transfer", (_LAST, _BEST, _RECORD, "pool", "workers"))
    source: Stored | Live
    alone: contextlib.AbstractContextManager[object] = contextlib.nullcontext()
    if isinstance(images, Synthesis):
        source, alone = Live(images, out / "pool", config.fill, config.epochs), Workers(out / "pool")
    else:
        source = Stored(images, config.fill, config.holdout, config.seed)
    student.to(device)
    with _feeding(student, source.info, config, device) as feed, alone, Workers(out):
        identity = _identity(source, config, name or type(student).__name__, student, feed.fed)
        optimizer = _optimizer(_trained(student, config), config)
        remove_temps(out)
        curve = _resume(out, identity, student, optimizer)
        if curve:  # a kill may have come between the state and what follows from it
            _tell(out, student, curve, identity, config)
        for number in range(len(curve), config.epochs):
            epoch = _epoch(number, student, optimizer, source.lessons(number), feed, config, device)
            curve.append(epoch)
            _keep(out, student, optimizer, curve, identity, config)
            if progress is not None:
                progress(number, epoch)
    return Transfer(out, curve, _best(curve), feed.fed)


class _Feed:
    """Gives a student its images as it wants them.

    Attributes:
        fed: ``kept`` or ``all``.
    """

    def __init__(self, student: nn.Module, info: ModelInfo, slot: TokenFeed | None) -> None:
        card = resolve_model_data_config(student)
        theirs = [torch.tensor(pair).view(-1, 1, 1) for pair in (info.mean, info.std)]
        channels = len(info.mean)
        ours = [torch.tensor(for_channels(card[key], channels)).view(-1, 1, 1) for key in ("mean", "std")]
        # Of the same pixels: one network's normalisation undone, the other's done.
        self._factor, self._shift = theirs[1] / ours[1], (theirs[0] - ours[0]) / ours[1]
        self._student, self._slot = student, slot
        self.fed = "all" if slot is None else "kept"

    def __call__(self, lessons: Lessons, chosen: Tensor, device: torch.device) -> Tensor:
        """(B, classes) logits of the student."""
        images = lessons.images[chosen] * self._factor + self._shift
        if self._slot is not None:
            self._slot.cells = lessons.keep[chosen].to(device)
        logits: Tensor = self._student(images.to(device))
        return logits


@contextlib.contextmanager
def _feeding(student: nn.Module, info: ModelInfo, config: TransferConfig, device: torch.device) -> Iterator[_Feed]:
    """What feeds the student; afterwards, however it ends, that is fed and trainable as it came."""
    reasons = TokenFeed.reasons_against(student, info)
    if config.tokens == "kept" and reasons:
        raise SmiError(f"the student cannot be fed kept patches alone: {'; '.join(reasons)}. Use tokens='all'.")
    classes = getattr(student, "num_classes", info.num_classes)
    if classes != info.num_classes:
        raise SmiError(
            f"the student has {classes} classes, the images' teacher {info.num_classes}; create the student with "
            f"num_classes={info.num_classes} (--num-classes)."
        )
    trainable = [(parameter, parameter.requires_grad) for parameter in student.parameters()]
    slot = TokenFeed(student) if config.tokens != "all" and not reasons else None
    try:
        feed = _Feed(student, info, slot)
        student.eval()
        if slot is not None:
            slot.cells = torch.zeros(1, 1, dtype=torch.int64, device=device)
        _try_out(student, info, device)
        yield feed
    finally:
        if slot is not None:
            slot.remove()
        for parameter, before in trainable:
            parameter.requires_grad_(before)


def _try_out(student: nn.Module, info: ModelInfo, device: torch.device) -> None:
    try:
        with torch.no_grad():
            logits: Any = student(torch.zeros(1, *info.input_size, device=device))
    except (RuntimeError, AssertionError) as error:
        channels, *size = info.input_size
        raise SmiError(
            f"the student does not take images of {' x '.join(map(str, size))} pixels in {channels} channels: "
            f"{str(error).splitlines()[0].rstrip('.')}. Create it with img_size={size[0]} (--img-size) and "
            f"in_chans={channels}."
        ) from error
    shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
    if shape != (1, info.num_classes):
        raise SmiError(
            f"the student gives {shape} for an image; expected (1, {info.num_classes}), a logit for each class of the "
            f"images' teacher."
        )


def _trained(student: nn.Module, config: TransferConfig) -> list[nn.Parameter]:
    if config.mode == "finetune":
        student.requires_grad_(True)
        return list(student.parameters())
    head: Any = getattr(student, "get_classifier", lambda: None)()
    parameters = list(head.parameters()) if isinstance(head, nn.Module) else []
    if not parameters:
        raise SmiError("the student has no classifier to train alone; use mode='finetune'.")
    student.requires_grad_(False)
    head.requires_grad_(True)
    return parameters


def _optimizer(trained: list[nn.Parameter], config: TransferConfig) -> torch.optim.Optimizer:
    if config.optimizer == "sgd":
        return torch.optim.SGD(trained, config.rate, momentum=0.9, weight_decay=config.weight_decay)
    return torch.optim.AdamW(trained, config.rate, weight_decay=config.weight_decay)


def _epoch(
    number: int,
    student: nn.Module,
    optimizer: torch.optim.Optimizer,
    lessons: Lessons,
    feed: _Feed,
    config: TransferConfig,
    device: torch.device,
) -> Epoch:
    """The images trained on, each pass in an order of its own, then a look at those held out."""
    draw = torch.Generator().manual_seed(config.seed * 1_000_003 + number)
    orders = [lessons.taught[torch.randperm(len(lessons.taught), generator=draw)] for _ in range(config.passes)]
    steps = [chosen for order in orders for chosen in order.split(config.batch_size)]
    student.train(config.mode == "finetune")  # a probe's backbone keeps the statistics it came with
    total = 0.0
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(config.seed * 1_000_003 + number)  # of dropout
        for step, chosen in enumerate(steps):
            done = (number + step / len(steps)) / config.epochs
            for group in optimizer.param_groups:
                group["lr"] = config.rate * 0.5 * (1 + math.cos(math.pi * done))
            try:
                logits = feed(lessons, chosen, device)
            except ValueError as error:  # of a batch norm that sees one value
                if len(chosen) > 1:
                    raise
                raise SmiError(
                    f"the student cannot be trained on a single image, the last of {len(lessons.taught)} in batches of "
                    f"{config.batch_size}: {error}. Use another batch_size."
                ) from error
            loss = divergence(logits, lessons.logits[chosen].to(device), config.temperature)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            total += loss.item() * len(chosen)
    student.eval()
    held = 0.0
    same = 0
    with torch.no_grad():
        for chosen in lessons.held.split(config.batch_size):
            logits, wanted = feed(lessons, chosen, device), lessons.logits[chosen].to(device)
            held += divergence(logits, wanted, config.temperature).item() * len(chosen)
            same += int((logits.argmax(1) == wanted.argmax(1)).sum())
    if not math.isfinite(total + held):
        raise SmiError(f"the loss of epoch {number} is not finite; use a lower learning_rate than {config.rate:g}.")
    return Epoch(total / sum(map(len, orders)), held / len(lessons.held), same / len(lessons.held))


def divergence(logits: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """``T^2 KL(softmax(teacher / T) || softmax(logits / T))``, mean over the batch (Hinton et al., 2015, section 2)."""
    wide = torch.promote_types(logits.dtype, torch.float32)
    student = F.log_softmax(logits.to(wide) / temperature, dim=1)
    wanted = F.log_softmax(teacher.to(wide) / temperature, dim=1)
    return F.kl_div(student, wanted, reduction="batchmean", log_target=True) * temperature**2


def _keep(
    out: Path,
    student: nn.Module,
    optimizer: torch.optim.Optimizer,
    curve: list[Epoch],
    identity: dict[str, Any],
    config: TransferConfig,
) -> None:
    """Write what the last epoch brought; the state comes first, for what follows from it can be written again.

    Trained again after a kill, an epoch need not bring the same to the last bit on a GPU, nor the best student again.
    """
    state = _checkpoint(student, optimizer, curve, identity)
    with writing(out, len(state)):
        atomic_write(out / _LAST, state)
    _tell(out, student, curve, identity, config)


def _tell(out: Path, student: nn.Module, curve: list[Epoch], identity: dict[str, Any], config: TransferConfig) -> None:
    """Write `student`, who is that of the last epoch, if it is the best so far, and the record."""
    number = len(curve) - 1
    best = save(_plain(student), {"epoch": str(number)}) if _best(curve) == number else b""
    with writing(out, len(best)):
        if best:
            atomic_write(out / _BEST, best)
        atomic_write(out / _RECORD, _record(identity, config, curve).encode())


def _best(curve: list[Epoch]) -> int:
    return min(range(len(curve)), key=lambda n: (-curve[n].agreement, curve[n].holdout_loss, n))


def _plain(student: nn.Module) -> dict[str, Tensor]:
    # Copies: safetensors refuses tensors that share memory, as tied weights do.
    state = student.state_dict().items()
    return {name: value.detach().cpu().clone(memory_format=torch.contiguous_format) for name, value in state}


def _identity(source: Stored | Live, config: TransferConfig, name: str, student: nn.Module, fed: str) -> dict[str, Any]:
    """What has to be the same for a run to go on; the student's first weights among it."""
    digest = hashlib.sha256()
    for key, value in sorted(_plain(student).items()):
        digest.update(key.encode() + value.flatten().view(torch.uint8).numpy().tobytes())
    return {
        "student": name,
        "weights_sha256": digest.hexdigest(),
        "teacher": source.info.name,
        "teacher_sha256": source.info.weights_sha256,
        **source.identity(),
        "fed": fed,
        "config": asdict(config),
    }


def _checkpoint(
    student: nn.Module, optimizer: torch.optim.Optimizer, curve: list[Epoch], identity: dict[str, Any]
) -> bytes:
    tensors = {f"student.{key}": value for key, value in _plain(student).items()}
    for number, state in optimizer.state_dict()["state"].items():
        for key, value in state.items():
            tensors[f"optimizer.{number}.{key}"] = torch.as_tensor(value).detach().cpu().contiguous()
    words = {"identity": json.dumps(identity), "curve": json.dumps([asdict(epoch) for epoch in curve])}
    return save(tensors, words)


def _resume(out: Path, identity: dict[str, Any], student: nn.Module, optimizer: torch.optim.Optimizer) -> list[Epoch]:
    """Take up the state in `out`; the epochs it holds."""
    if not os.path.lexists(out / _LAST):
        return []
    try:
        check_inside(out, out / _LAST)
        with safe_open(out / _LAST, framework="pt") as file:
            words: dict[str, str] = file.metadata()
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  not a dictionary
        theirs, curve = dict(json.loads(words["identity"])), _curve(json.loads(words["curve"]))
    except Exception as error:
        raise _damaged(out, error) from error
    for key in identity:
        if theirs.get(key) != identity[key]:
            raise SmiError(
                f"{str(out)!r} holds another run: its {key} is {theirs.get(key)!r}, this one's {identity[key]!r}. "
                f"Choose another folder."
            )
    try:
        _restore(tensors, student, optimizer)
    except Exception as error:
        raise _damaged(out, error) from error
    return curve


def _curve(told: Any) -> list[Epoch]:
    curve = [Epoch(**entry) for entry in told]
    if not curve or not all(type(value) is float and math.isfinite(value) for e in curve for value in vars(e).values()):
        raise ValueError("its curve is no list of finite numbers")
    return curve


def _restore(tensors: dict[str, Tensor], student: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    student.load_state_dict({k.removeprefix("student."): v for k, v in tensors.items() if k.startswith("student.")})
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        if key.startswith("optimizer."):
            _, number, name = key.split(".")
            state.setdefault(int(number), {})[name] = value
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for place, values in state.items():
        for name, value in values.items():
            if value.ndim and value.shape != trained[place].shape:
                raise ValueError(f"{name} of parameter {place} is of another shape")
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})


def _damaged(out: Path, error: Exception) -> SmiError:
    reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
    return SmiError(f"{str(out / _LAST)!r} is damaged ({reason}); remove it to begin again.")


def _record(identity: dict[str, Any], config: TransferConfig, curve: list[Epoch]) -> str:
    best = _best(curve)
    record = {**identity, "epochs": len(curve), "best": best, "agreement": curve[best].agreement}
    return json.dumps({**record, "curve": [asdict(epoch) for epoch in curve]}, indent=2) + "\n"
