"""What words on the command line mean: settings, numbers and classes, durations, shards; and how they are written."""

from __future__ import annotations

import re
import shlex
from typing import TYPE_CHECKING, Any, get_type_hints

from smi.config import Config
from smi.errors import SmiError, did_you_mean, reason

if TYPE_CHECKING:
    from pathlib import Path

    from smi.state import ModelInfo


def parse_setting(text: str) -> tuple[str, Any]:
    """``key=value`` with the value read as YAML; a list may also be written 50,100."""
    import yaml

    key, equals, value = text.partition("=")
    key = key.strip().replace("-", "_")
    if not equals or not key:
        raise SmiError(f"--set {text!r} is not KEY=VALUE; write e.g. --set tv2=1e-4.")
    known = get_type_hints(Config)
    if key not in known:
        raise SmiError(f"--set {text!r}: unknown config option {key!r}.{did_you_mean(key, known, limit=40)}")
    if key in ("prune_at", "prune_ratio"):
        return key, parse_numbers(f"--set {key}", value)
    try:
        return key, yaml.safe_load(value)
    except Exception:  # dates and numbers raise whatever their readers do
        raise SmiError(
            f"--set {text!r}: {value!r} cannot be read; write a plain number, word, true or false."
        ) from None


def parse_numbers(option: str, text: str) -> list[int | float]:
    """``50,100`` or ``[.3, .3]``; empty text is the empty list."""
    inner = text.strip().removeprefix("[").removesuffix("]").strip()
    try:
        return [int(p) if re.fullmatch(r"[+-]?\d+", p.strip()) else float(p) for p in inner.split(",")] if inner else []
    except ValueError:
        raise SmiError(f"{option} is {text!r}; expected numbers separated by commas, e.g. 50,100.") from None


def parse_classes(text: str, info: ModelInfo) -> list[int]:
    """Numbers, inclusive ranges and class names, in the order given; each class counts once."""
    names: dict[str, list[int]] = {}
    for number, name in enumerate(info.class_names):
        names.setdefault(name.casefold(), []).append(number)
    chosen: list[int] = []
    for part in (p.strip() for p in text.split(",")):
        span = re.fullmatch(r"(\d{1,18})(?:\s*-\s*(\d{1,18}))?", part)
        if named := names.get(part.casefold()):
            if len(named) > 1:
                raise SmiError(f"the classes {', '.join(map(str, named))} are all named {part!r}; give their numbers.")
            chosen += named
        elif span:
            first, last = int(span[1]), int(span[2] or span[1])
            if last < first:
                raise SmiError(f"--classes contains the range {part}; write {last}-{first}.")
            if last >= info.num_classes:
                raise SmiError(f"class {last} does not exist; the model has classes 0 to {info.num_classes - 1}.")
            chosen.extend(range(first, last + 1))
        elif names and part:
            kinds = [name for name in names if part.casefold() in name.split()]  # of cats, ImageNet has several
            raise SmiError(f"unknown class {part!r}.{did_you_mean(part.casefold(), kinds or names, limit=10)}")
        else:
            raise SmiError(f"--classes contains {part!r}; expected numbers or ranges such as 0,3,7-9.")
    return list(dict.fromkeys(chosen))


def read_lines(file: Path) -> list[str]:
    """The lines of a text file, without the blanks around them."""
    try:
        return [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise SmiError(f"cannot read {str(file)!r}: {reason(error)}; expected a text file in UTF-8.") from None


_UNITS = {"h": 3600.0, "m": 60.0, "s": 1.0, "": 1.0}


def parse_duration(text: str) -> float:
    """Seconds in ``90s``, ``10m``, ``1h30m`` or a bare number of seconds."""
    parts = re.findall(r"(\d+(?:\.\d+)?)\s*([hms]?)", text.strip().lower())
    seconds = sum(float(number) * _UNITS[unit] for number, unit in parts)
    if not re.fullmatch(r"(?:\d+(?:\.\d+)?\s*[hms]\s*)+|\d+(?:\.\d+)?", text.strip().lower()) or seconds <= 0:
        raise SmiError(f"--time-budget is {text!r}; expected a time such as 90s, 10m or 1h30m.")
    return seconds


def parse_shard(text: str) -> tuple[int, int]:
    """``0/4`` to ``3/4``."""
    match = re.fullmatch(r"(\d{1,18})/(\d{1,18})", text.strip())
    if match is None or int(match[1]) >= int(match[2]):
        raise SmiError(f"--shard is {text!r}; expected I/N with I from 0 to N - 1, e.g. 0/4.")
    return int(match[1]), int(match[2])


def slug(name: str) -> str:
    """A model name as a folder name."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.") or "model"


def command_line(*words: object) -> str:
    """As a shell takes it."""
    return shlex.join(map(str, words))
