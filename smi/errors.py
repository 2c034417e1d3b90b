"""The one exception type of the library: something the user can mend.

The command line prints it as one line; everything else is a bug of ours and keeps its traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class SmiError(ValueError):
    """Bad input, an unsupported model, an unusable file: its message names the value and the mend."""


def did_you_mean(value: str, options: Iterable[str], limit: int = 8) -> str:
    """`` Did you mean 'x'?`` for a near miss, otherwise the options themselves (at most `limit`)."""
    options = list(options)
    near = difflib.get_close_matches(value[:200], options, n=1, cutoff=0.6)
    if near:
        return f" Did you mean {near[0]!r}?"
    shown = ", ".join(options[:limit])
    return f" Choose one of: {shown}{', ...' if len(options) > limit else ''}."


def reason(error: Exception) -> str:
    """What `error` says, as part of a sentence."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = f"{error} is missing" if isinstance(error, KeyError) else str(error) or type(error).__name__
    return text.splitlines()[0].rstrip(".")
