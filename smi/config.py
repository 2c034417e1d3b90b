"""Everything that decides what an inversion computes, as one typed, validated, serialisable value.

The mathematics is that of Hu et al., "Sparse Model Inversion", ICML 2024, section 3; the defaults are its published
setting (appendix, "implementation details"). ``semantics`` chooses between what the paper says and what its code does;
each finer option left at ``None`` follows it.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import reprlib
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from smi.errors import SmiError, did_you_mean
from smi.files import atomic_write, read_bytes, writing

_LARGEST_FILE = 1 << 20  # bytes
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 80

Semantics = Literal["strict", "official"]
Jitter = Literal["patch", "pixel", "none"]
Stopped = Literal["frozen", "evolve"]
Scope = Literal["image", "batch"]
ResultMask = Literal["carried", "reranked"]
ModelRanking = Literal[
    "auto",
    "class_attention",
    "attention_pool",
    "received_attention",
    "class_attention_last_4",
    "attention_rollout",
]
Ranking = Literal[ModelRanking, "gradient_input", "random"]
Precision = Literal["fp32", "tf32", "bf16", "fp16"]
MAX_ITERATIONS = 10_000_000  # histories and progress keep a number for each


@dataclass(frozen=True, kw_only=True)
class Config:
    """One inversion, completely described but for the model and the targets.

    Attributes:
        strategy: which patches are fed: all (``dense``), the highest ranked (``sparse``), or a random choice of the
            same number (``random``, the control that every claim about ranking needs); ``rebirth`` takes the highest
            ranked out as a finished image and goes on with the rest; ``fusion`` feeds all and merges alike tokens
            inside the network (Bolya et al., "Token Merging", ICLR 2023). Only sparse and random use the schedule.
        semantics: ``strict`` is what the paper says (a stopped patch is a constant), ``official`` what its published
            code does (it goes on moving under the priors and Adam). See `resolved`.
        iterations: number of update steps T.
        prune_at: iterations t at which patches are stopped, 1 <= t < T, increasing, no two adjacent.
        prune_ratio: share r of the surviving patches stopped at each, 0 < r < 1; floor(K (1 - r)) go on.
        division: v of ``rebirth``: sparse images of each trajectory, of which each has floor(N / v) of N patches.
        merge_to: share of the patches that ``fusion`` leaves as tokens in front of the last block, in (0, 1].
        ranking: what patches are ranked by; ``auto`` takes the best signal the model has, the other attentions as in
            `smi.SparseModel`. ``gradient_input`` is the sum over a patch's pixels of |gradient of the loss x pixel|
            (Shrikumar et al., "Not Just a Black Box", 2016), ``random`` each image's own draw.
        cross_entropy, tv1, tv2, l2: weights of the built-in objectives.
        learning_rate, beta1, beta2, eps: Adam on the pixels, no weight decay.
        lr_schedule, warmup: how the learning rate changes, see `lr_factors`; `warmup` counts iterations.
        flip: flip the batch (or image) horizontally with probability 1/2 as part of the augmentation.
        jitter: ``patch`` shifts by whole patches (cells map exactly), ``pixel`` by any number of pixels (a patch goes
            to the nearest cell, as published), ``none`` not at all. At most floor(H/8), floor(W/8) pixels.
        augment_per: one draw of (dy, dx, flip) per image or for the whole batch.
        stopped: ``frozen`` patches get exactly zero gradient, prior, momentum and update; ``evolve`` lets them move.
        norm: TV and L2 norms per image or over the whole batch tensor (which couples the images of a batch).
        result_mask: ``carried`` reports the patches really inverted, ``reranked`` ranks once more on a dense pass over
            the final image and keeps floor((N + prefix) prod(1 - r)), as the published code does.
        best: return each image's best iterate (lowest objective on an un-augmented evaluation, since the last
            pruning) in place of the last one; evaluated every `best_every` iterations.
        batch_size: images inverted together, for ``rebirth`` trajectories, of `division` images each; under official
            semantics part of the meaning (norms run over the batch).
        seed: the one source of randomness, >= 0.
        precision: arithmetic of the network; pixels, moments and losses are always float32. `tf32` and `fp16` run on
            the fused kernels alone.
        tolerance: stop a batch early when the objective, averaged over `patience` iterations, improved by less than
            this relative amount over the `patience` before, and the last pruning is past; 0 never stops.
        patience: see `tolerance`.
        snapshots: of how many images of each batch to keep 8-bit pictures at every pruning, for reports.
    """

    strategy: Literal["dense", "sparse", "random", "rebirth", "fusion"] = "sparse"
    semantics: Semantics = "strict"
    iterations: int = 4000
    prune_at: tuple[int, ...] = (50, 100, 200, 300)
    prune_ratio: tuple[float, ...] = (0.3, 0.3, 0.3, 0.3)
    division: int = 4
    merge_to: float = 0.25
    ranking: Ranking = "auto"
    cross_entropy: float = 1.0
    tv1: float = 0.0
    tv2: float = 1e-4
    l2: float = 0.0
    learning_rate: float = 0.25
    lr_schedule: Literal["constant", "cosine"] = "constant"
    warmup: int = 0
    beta1: float = 0.5
    beta2: float = 0.99
    eps: float = 1e-8
    flip: bool = True
    jitter: Jitter | None = None
    augment_per: Scope | None = None
    stopped: Stopped | None = None
    norm: Scope | None = None
    result_mask: ResultMask | None = None
    best: bool = False
    best_every: int = 20
    batch_size: int = 32
    seed: int = 0
    precision: Precision = "fp32"
    tolerance: float = 0.0
    patience: int = 100
    snapshots: int = 8

    def __post_init__(self) -> None:
        for field, kind in _types().items():
            object.__setattr__(self, field, _convert(field, getattr(self, field), kind))
        self._check_ranges()
        self._check_schedule()
        if self.strategy == "rebirth":
            self._check_rebirth()
        if self.ranking == "random" and self.result_mask == "reranked":
            raise SmiError("result_mask 'reranked' would draw the patches anew under ranking 'random'; use 'carried'.")

    def _check_ranges(self) -> None:
        at_least = {
            "division": 2,
            "iterations": 1,
            "batch_size": 1,
            "seed": 0,
            "patience": 1,
            "snapshots": 0,
            "best_every": 1,
            "warmup": 0,
        }
        for name, low in at_least.items():
            if getattr(self, name) < low:
                raise SmiError(f"{name} is {getattr(self, name)}; expected at least {low}.")
        if self.iterations > MAX_ITERATIONS:
            raise SmiError(f"iterations is {self.iterations}; expected at most {MAX_ITERATIONS:,}.")
        for name in ("cross_entropy", "tv1", "tv2", "l2", "learning_rate", "eps", "tolerance"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise SmiError(f"{name} is {value}; expected a finite number >= 0.")
        if self.warmup >= self.iterations:
            raise SmiError(f"warmup is {self.warmup}; expected fewer than the {self.iterations} iterations.")
        if not 0 < self.merge_to <= 1:
            raise SmiError(f"merge_to is {self.merge_to}; expected a share of the patches above 0, at most 1.")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise SmiError(f"{name} is {getattr(self, name)}; expected 0 <= {name} < 1.")

    def _check_schedule(self) -> None:
        at, ratios = self.prune_at, self.prune_ratio
        if len(at) != len(ratios):
            raise SmiError(
                f"prune_at has {len(at)} entries and prune_ratio has {len(ratios)}; give one ratio for each iteration."
            )
        for ratio in ratios:
            if not 0 < ratio < 1:
                raise SmiError(
                    f"prune_ratio contains {ratio}; expected shares strictly between 0 and 1 (0.3 stops 30 %)."
                )
        for earlier, later in itertools.pairwise(at):
            if later <= earlier:
                raise SmiError(f"prune_at is {list(at)}; {later} follows {earlier}. Sort it, without repeats.")
            if later == earlier + 1:
                raise SmiError(
                    f"prune_at contains the adjacent iterations {earlier} and {later}; the ranking needs one "
                    f"un-augmented iteration before each pruning. Move one of them by at least 1."
                )
        if at and at[0] < 1:
            raise SmiError(f"prune_at starts with {at[0]}; the first possible one is iteration 1 (0 has no ranking).")
        if at and self.scheduled and at[-1] >= self.iterations:
            raise SmiError(
                f"prune_at contains {at[-1]}, but iterations is {self.iterations}. "
                f"Raise iterations above {at[-1]} or prune earlier."
            )

    def _check_rebirth(self) -> None:
        if self.iterations < 2 * self.division:
            raise SmiError(
                f"iterations is {self.iterations} and division {self.division}; every part of a trajectory needs two "
                f"iterations, the second to rank in. Use at least {2 * self.division} iterations."
            )
        if self.best:
            raise SmiError("best goes with one result for each trajectory; rebirth has several. Leave it out.")
        if self.result_mask == "reranked":
            raise SmiError("result_mask 'reranked' would undo what rebirth has taken out; use 'carried'.")

    @property
    def scheduled(self) -> bool:
        """Whether the strategy prunes by `prune_at` and `prune_ratio`; others have their own rules, or never prune."""
        return self.strategy in ("sparse", "random")

    @property
    def model_ranking(self) -> ModelRanking:
        """What the model has to rank by; ``auto`` where it is not the model that ranks."""
        return "auto" if self.ranking == "gradient_input" or self.ranking == "random" else self.ranking

    @property
    def model_merge_to(self) -> float | None:
        """`merge_to` where the model has to merge, else None."""
        return self.merge_to if self.strategy == "fusion" else None

    @property
    def images_per_trajectory(self) -> int:
        """Results of one optimised image: `division` under ``rebirth``, else 1."""
        return self.division if self.strategy == "rebirth" else 1

    def resolved(self) -> Config:
        """The same config with every option that follows `semantics` written out."""
        strict = self.semantics == "strict"
        follow: dict[str, Any] = {
            "jitter": "patch" if strict else "pixel",
            "augment_per": "image" if strict else "batch",
            "stopped": "frozen" if strict else "evolve",
            "norm": "image" if strict else "batch",
            "result_mask": "carried"
            if strict or self.strategy in ("rebirth", "fusion") or self.ranking == "random"
            else "reranked",
        }
        return dataclasses.replace(self, **{k: v for k, v in follow.items() if getattr(self, k) is None})

    def schedule(self, num_patches: int) -> dict[int, int]:
        """Pruning iteration -> patches kept from it on: floor(K (1 - r)) each ([SMI] algorithm 1).

        Ratios are read as the decimals they are written as, so that 10 patches at 0.9 leave 1, not 0. Under rebirth
        floor(N / v) patches leave at each of the first v - 1 multiples of floor(T / v).
        """
        kept = num_patches
        result: dict[int, int] = {}
        if self.strategy in ("dense", "fusion"):
            return result
        if self.strategy == "rebirth":
            if num_patches < self.division:
                raise SmiError(
                    f"division is {self.division}, but the model has {num_patches} patches; use a smaller division."
                )
            every, each = self.iterations // self.division, num_patches // self.division
            return {k * every: num_patches - k * each for k in range(1, self.division)}
        for t, ratio in zip(self.prune_at, self.prune_ratio, strict=True):
            before, kept = kept, keep_count(kept, ratio)
            if kept < 1:
                raise SmiError(
                    f"pruning {ratio:g} of {before} patches at iteration {t} leaves none; "
                    f"use smaller ratios or fewer prunings (the model has {num_patches} patches)."
                )
            result[t] = kept
        return result

    def lr_factors(self) -> list[float] | None:
        """What the learning rate is multiplied by in each iteration, above 0, at most 1; None where always by 1.

        It rises in equal steps for `warmup` iterations; then ``cosine`` lowers it along half a cosine towards 0
        (Loshchilov & Hutter, "SGDR", ICLR 2017, eq. 5), as inversions of convolutional networks do (Yin et al.,
        "Dreaming to Distill", CVPR 2020).
        """
        if self.lr_schedule == "constant" and not self.warmup:
            return None
        rest = self.iterations - self.warmup
        falling = [
            0.5 * (1 + math.cos(math.pi * t / rest)) if self.lr_schedule == "cosine" else 1.0 for t in range(rest)
        ]
        return [(t + 1) / self.warmup for t in range(self.warmup)] + falling

    def replace(self, /, **changes: Any) -> Config:
        """A copy with `changes`; unknown names raise `SmiError` with the nearest valid one."""
        known = _types()
        for name in changes:
            if name not in known:
                raise SmiError(f"unknown config option {name!r}.{did_you_mean(name, known, limit=40)}")
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Plain data: lists for tuples, ready for YAML and JSON."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Config:
        return cls().replace(**data)

    def save(self, path: str | Path) -> None:
        """Write YAML that `load` reads back to an equal config."""
        import yaml

        with writing(Path(path)):
            atomic_write(Path(path), yaml.safe_dump(self.to_dict(), sort_keys=False).encode())

    @classmethod
    def load(cls, path: str | Path) -> Config:
        """Read YAML: a mapping of option names to values, and optionally ``preset: NAME`` to start from.

        Raises:
            SmiError: no such file, not YAML, not a mapping, unknown option, wrong type or range.
        """
        import yaml

        try:
            data = yaml.safe_load(read_bytes(Path(path), _LARGEST_FILE))
        except OSError as error:
            raise SmiError(f"cannot read the config {str(path)!r}: {error.strerror}.") from None
        except Exception as error:  # dates, numbers and depth raise whatever their readers do
            reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
            raise SmiError(f"the config {str(path)!r} is not valid YAML: {reason}.") from None
        if not isinstance(data, dict):
            raise SmiError(f"the config {str(path)!r} holds {type(data).__name__}; expected option: value lines.")
        base = preset(data.pop("preset")) if "preset" in data else cls()
        for key in data:
            if not isinstance(key, str):
                raise SmiError(f"the config {str(path)!r} has the key {_shown(key)}; expected names of options.")
        return base.replace(**data)


def keep_count(patches: int, ratio: float) -> int:
    """floor(patches (1 - ratio)) in exact decimal arithmetic."""
    return math.floor(patches * (1 - Fraction(repr(float(ratio)))))


@functools.cache
def _types() -> dict[str, Any]:
    return get_type_hints(Config)


def _convert(name: str, value: Any, kind: Any) -> Any:
    """Check `value` against the annotation `kind`; integers pass as floats, lists as tuples, nothing else is bent."""
    options = get_args(kind)
    if type(None) in options:
        if value is None:
            return None
        return _convert(name, value, next(o for o in options if o is not type(None)))
    if get_origin(kind) is Literal:
        if value not in options:
            shown = _shown(value)
            raise SmiError(f"{name} is {shown}.{did_you_mean(shown.strip(chr(39)), [str(o) for o in options])}")
        return value
    if get_origin(kind) is tuple:
        if isinstance(value, str) or not isinstance(value, (list, tuple)):
            raise SmiError(f"{name} is {_shown(value)}; expected a list of numbers.")
        return tuple(_convert(f"{name}[{i}]", item, options[0]) for i, item in enumerate(value))
    if kind is bool:
        if isinstance(value, bool):
            return value
    elif kind is int:
        if isinstance(value, int) and not isinstance(value, bool):
            if abs(value) >= 2**63:
                raise SmiError(f"{name} is {_shown(value)}; expected a number of less than 64 bits.")
            return value
    elif kind is float:
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            try:
                return float(value)
            except OverflowError:
                raise SmiError(f"{name} is {_shown(value)}; expected a number below 1e308.") from None
        if isinstance(value, str):  # YAML 1.1 reads 1e-4 as text
            try:
                return float(value)
            except ValueError:
                pass
    raise SmiError(f"{name} is {_shown(value)}; expected {'a number' if kind is float else kind.__name__}.")


def _shown(value: Any) -> str:
    """`value` for a message; YAML can make text, numbers and nests without end out of a few lines."""
    try:
        return _SHORT.repr(value)
    except ValueError:  # of more digits than Python writes
        return f"a number of {value.bit_length()} bits"


PRESETS: dict[str, Config] = {
    # [SMI] section 4.1 and appendix: W/A quantization and knowledge transfer.
    "paper-quant": Config(),
    "paper-transfer": Config(batch_size=100),
    "dense": Config(strategy="dense"),
    # Calibration sets: accuracy after quantization hardly depends on iterations between 100 and 4000.
    "fast": Config(iterations=400, prune_at=(25, 50, 100, 150)),
    # The embedded teacher: 64, 44, 30, 21, 16 patches. Sub-patch jitter and the smaller step were chosen for what the
    # judge recognises: with whole-patch jitter, of which 32 x 32 pixels allow one step, images only fool the teacher.
    "demo": Config(
        iterations=400,
        prune_at=(40, 80, 120, 160),
        prune_ratio=(0.3, 0.3, 0.3, 0.22),
        jitter="pixel",
        learning_rate=0.1,
        tv2=5e-3,
        batch_size=40,
        snapshots=10,
    ),
}


def preset(name: str) -> Config:
    """The named preset. Raises `SmiError` with the nearest name."""
    if not isinstance(name, str) or name not in PRESETS:  # YAML may hold anything
        shown = _shown(name)
        raise SmiError(f"unknown preset {shown}.{did_you_mean(shown.strip(chr(39)), PRESETS)}")
    return PRESETS[name]


def preset_or_file(name: str) -> Config:
    """The named preset, or what the YAML file of that name holds. Raises `SmiError` as `preset` and `Config.load`."""
    return Config.load(name) if name not in PRESETS and Path(name).is_file() else preset(name)
