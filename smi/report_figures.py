"""The drawings of a report, as PNG bytes: image strips over the stages, maps of dropped patches, loss curves.

Text that a user can choose (class names) never gets into a drawing: the page carries it.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import BoundaryNorm, LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from PIL import Image

from smi.report_data import Array, Curve, Picture

CELL = 160  # pixels: the largest that a picture is drawn; small images are enlarged by a whole factor
GAP = 8  # pixels between the stages of a strip
_DIMMED = 34  # alpha of a dropped patch, of 255
_WIDTH, _DPI = 9.6, 160


@dataclass(frozen=True)
class Theme:
    """Colours of the page, its text and its marks; `low` to `high` is the scale of the maps."""

    page: str
    ink: str
    muted: str
    line: str
    accent: str
    mark: str
    low: str
    high: str

    def scale(self) -> LinearSegmentedColormap:
        return LinearSegmentedColormap.from_list("smi", [self.low, self.accent, self.high])


LIGHT = Theme("#fbfaf7", "#23262a", "#6d7278", "#dcd8cf", "#2f7196", "#b4552d", "#e9e5db", "#0f3350")
DARK = Theme("#15171a", "#e4e2dc", "#979ca3", "#33373d", "#6fb1d6", "#e08a5f", "#262a2f", "#d8effa")


def strip(picture: Picture, columns: int) -> bytes:
    """PNG (RGBA) of the picture's frames side by side, dropped patches faded so that the page shows through.

    The result stands in the last of `columns`, the earlier stages from the first on.
    """
    cells = [_cell(frame.pixels, frame.live) for frame in picture.frames]
    height, width = cells[0].shape[:2]
    sheet = np.zeros((height, columns * (width + GAP) - GAP, 4), np.uint8)
    for place, cell in zip([*range(len(cells) - 1), columns - 1], cells, strict=True):
        left = place * (width + GAP)
        sheet[:, left : left + width] = cell
    buffer = io.BytesIO()
    Image.fromarray(sheet).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def _cell(pixels: Array, live: Array) -> Array:
    """(H, W, 3) uint8 and (rows, columns) bool -> (h, w, 4) uint8 of at most `CELL` pixels."""
    height, width = pixels.shape[:2]
    rows = np.arange(height) * live.shape[0] // height
    columns = np.arange(width) * live.shape[1] // width
    alpha = np.where(live[rows][:, columns], 255, _DIMMED).astype(np.uint8)
    cell = np.dstack([pixels, alpha])
    factor = CELL // max(height, width)
    if factor:
        return cell.repeat(factor, 0).repeat(factor, 1)
    shrink = CELL / max(height, width)
    size = (max(1, round(width * shrink)), max(1, round(height * shrink)))
    return np.asarray(Image.fromarray(cell).resize(size, Image.Resampling.BOX))


def mean_maps(survived: Array, drop_mean: Array | None, theme: Theme) -> bytes:
    """Maps over the patch grid, each (rows, columns) float64.

    Args:
        survived: share of images in which the patch was never dropped, 0..1.
        drop_mean: mean iteration at which it was dropped where it was, NaN where it never was; None draws no such map.
    """
    figure = _figure(3.9, theme)
    left, right = figure.subplots(1, 2)
    _map(left, survived, "survived to the end (share of images)", (0.0, 1.0), theme)
    if drop_mean is None:
        right.set_axis_off()
    else:
        span = (float(np.nanmin(drop_mean)), float(np.nanmax(drop_mean)))
        _map(right, drop_mean, "mean iteration of being dropped, where dropped", span, theme)
    return _png(figure)


def _map(axes: Axes, values: Array, title: str, span: tuple[float, float], theme: Theme) -> None:
    drawn = axes.imshow(values, cmap=theme.scale(), vmin=span[0], vmax=span[1], interpolation="nearest")
    _bare(axes, theme)
    axes.set_title(title, color=theme.ink, fontsize=9.5, loc="left", pad=8)
    _style_bar(axes.figure.colorbar(drawn, ax=axes, fraction=0.046, pad=0.03), theme)


def image_maps(pictures: Sequence[Picture], prunings: Sequence[int], theme: Theme) -> bytes:
    """One small map for each picture: the pruning at which each patch went, or "kept"."""
    columns = min(8, len(pictures))
    rows = math.ceil(len(pictures) / columns)
    tall, wide = pictures[0].dropped_at.shape
    figure = _figure(0.5 + rows * (1.2 * tall / wide + 0.2), theme)
    grid = figure.subplots(rows, 8, squeeze=False)
    levels = len(prunings) + 1
    norm = BoundaryNorm(np.arange(levels + 1) - 0.5, theme.scale().N)
    drawn = None
    for place, axes in enumerate(grid.flat):
        if place >= len(pictures):
            axes.set_axis_off()
            continue
        dropped = pictures[place].dropped_at
        stage = np.where(np.isnan(dropped), levels - 1, np.searchsorted(prunings, dropped))
        drawn = axes.imshow(stage, cmap=theme.scale(), norm=norm, interpolation="nearest")
        _bare(axes, theme)
        axes.set_title(f"#{pictures[place].index}", color=theme.muted, fontsize=8, loc="left", pad=3)
    assert drawn is not None
    bar = figure.colorbar(
        drawn, ax=grid, orientation="horizontal", fraction=0.05, aspect=60, pad=0.04, anchor=(0, 1), ticks=range(levels)
    )
    _style_bar(bar, theme)
    bar.ax.set_xticklabels([*(f"dropped at {t}" if levels < 9 else str(t) for t in prunings), "kept"])
    return _png(figure)


def loss_curves(
    curves: Mapping[str, Curve], weights: Mapping[str, float], prunings: Sequence[int], theme: Theme
) -> bytes:
    """A panel for every term that is not zero throughout: mean over batches, band from lowest to highest batch.

    The iteration axis is logarithmic when all prunings come early, the value axis when values span a factor of 20.
    """
    shown = {name: curve for name, curve in curves.items() if not curve.vanishes}
    shown = dict(sorted(shown.items(), key=lambda item: item[0] == "total"))  # the sum comes last
    columns = min(len(shown), 2 if len(shown) in (2, 4) else 3)
    rows = math.ceil(len(shown) / columns)
    figure = _figure(2.5 * rows + 0.2, theme)
    grid = figure.subplots(rows, columns, squeeze=False)
    early = bool(prunings) and prunings[-1] < max(len(c.mean) for c in shown.values()) / 8
    for place, (axes, (name, curve)) in enumerate(zip(grid.flat, shown.items(), strict=False)):
        mean = curve.mean
        at = np.arange(len(mean)) + (1 if early else 0)
        finite = curve.count > 0
        axes.fill_between(
            at, curve.low, curve.high, where=finite & (curve.count > 1), color=theme.accent, alpha=0.22, linewidth=0
        )
        alone = len(mean) == 1
        axes.plot(at, mean, color=theme.accent, linewidth=1.1, marker="o" if alone else None, markersize=4)
        for t in prunings:
            axes.axvline(t + (1 if early else 0), color=theme.mark, linewidth=0.8, alpha=0.75, linestyle=(0, (4, 3)))
        if early:
            axes.set_xscale("log")
            axes.xaxis.set_major_formatter("{x:g}")
            axes.set_xlim(1, len(mean))
        elif not alone:
            axes.set_xlim(0, len(mean) - 1)
        positive = curve.low[finite].min() > 0
        if positive and curve.high[finite].max() / curve.low[finite].min() > 20:
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter("{x:g}")
        if not early:
            axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        weight = f"   weight {weights[name]:g}" if name in weights else ""
        title = axes.set_title(
            f"{name.replace('_', ' ')}{weight}", color=theme.ink, fontsize=9.5, loc="left", pad=7, parse_math=False
        )
        title.set_wrap(True)
        if place >= len(shown) - columns:
            axes.set_xlabel("iteration + 1 (log)" if early else "iteration", color=theme.muted, fontsize=8.5)
        _style(axes, theme)
    for axes in list(grid.flat)[len(shown) :]:
        axes.set_axis_off()
    return _png(figure)


@dataclass(frozen=True)
class Panel:
    """Quality against cost of several methods.

    Attributes:
        title: of the quality.
        curves: method -> points (cost, values of all seeds), in order of cost.
        counted: method -> the point of an equal number of images.
        controls: name -> values of all seeds, of what costs nothing: dotted lines across.
        reference: a line across, such as the teacher's own accuracy.
        percent: whether values are shares.
    """

    title: str
    curves: Mapping[str, Sequence[tuple[float, Sequence[float]]]]
    counted: Mapping[str, tuple[float, Sequence[float]]]
    controls: Mapping[str, Sequence[float]]
    reference: float | None = None
    percent: bool = True


def comparison(panels: Sequence[Panel], maps: Mapping[str, Array], cost: str, theme: Theme) -> bytes:
    """Panels of curves, and under them maps (rows, columns) of how often every place of the grid was updated.

    A curve is the mean over seeds with a band from the lowest to the highest; a square is an equal number of images.
    """
    rows = math.ceil(len(panels) / 2)
    figure = _figure(3.4 * rows + 2.3, theme)
    parts: Any = figure.subfigures(2, 1, height_ratios=[3.4 * rows, 2.3])
    upper, lower = parts
    names = dict.fromkeys([*maps, *(name for panel in panels for name in panel.controls)])
    colours = {name: f"C{place}" for place, name in enumerate(names)}
    grid = upper.subplots(rows, min(2, len(panels)), squeeze=False)
    for axes, panel in zip(grid.flat, panels, strict=False):
        _compare(axes, panel, colours, theme)
        axes.set_xlabel(cost, color=theme.muted, fontsize=8.5)
    for axes in list(grid.flat)[len(panels) :]:
        axes.set_axis_off()
    highest = max(float(np.max(values)) for values in maps.values())
    drawn = None
    places = lower.subplots(1, len(maps), squeeze=False)
    for axes, (name, values) in zip(places.flat, maps.items(), strict=True):
        drawn = axes.imshow(values, cmap=theme.scale(), vmin=0, vmax=highest, interpolation="nearest")
        _bare(axes, theme)
        axes.set_title(f"{name}: updates of each patch", color=colours[name], fontsize=8, loc="left", pad=5)
    assert drawn is not None
    _style_bar(lower.colorbar(drawn, ax=places, fraction=0.03, pad=0.02), theme)
    return _png(figure)


def _compare(axes: Axes, panel: Panel, colours: Mapping[str, str], theme: Theme) -> None:
    for name, points in panel.curves.items():
        at, values = [cost for cost, _ in points], [np.asarray(seeds, float) for _, seeds in points]
        mean = [float(v.mean()) for v in values]
        axes.plot(at, mean, color=colours[name], linewidth=1.4, marker="o", markersize=3.5, label=name)
        low, high = [float(v.min()) for v in values], [float(v.max()) for v in values]
        axes.fill_between(at, low, high, color=colours[name], alpha=0.15, linewidth=0)
    for name, (cost, seeds) in panel.counted.items():
        axes.scatter([cost], [float(np.mean(seeds))], s=50, marker="s", facecolors="none", edgecolors=colours[name])
    for name, seeds in panel.controls.items():
        axes.axhline(float(np.mean(seeds)), color=colours[name], linewidth=1.2, linestyle=(0, (1, 2)), label=name)
        axes.axhspan(min(seeds), max(seeds), color=colours[name], alpha=0.1, linewidth=0)
    if panel.reference is not None:
        axes.axhline(panel.reference, color=theme.muted, linewidth=0.8, linestyle=(0, (4, 3)))
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0) if panel.percent else "{x:g}")
    axes.set_title(panel.title, color=theme.ink, fontsize=9.5, loc="left", pad=7)
    axes.legend(fontsize=8, frameon=False, labelcolor=theme.ink)
    _style(axes, theme)


def _figure(height: float, theme: Theme) -> Figure:
    figure = Figure(figsize=(_WIDTH, height), dpi=_DPI, facecolor=theme.page, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _style(axes: Axes, theme: Theme) -> None:
    axes.set_facecolor(theme.page)
    axes.tick_params(which="both", colors=theme.muted, labelsize=8, length=3, width=0.6)
    axes.grid(True, which="major", color=theme.line, linewidth=0.6)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(theme.line)


def _bare(axes: Axes, theme: Theme) -> None:
    axes.set_facecolor(theme.page)
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_color(theme.line)
        spine.set_linewidth(0.6)


def _style_bar(bar: Any, theme: Theme) -> None:
    bar.outline.set_visible(False)
    bar.ax.tick_params(colors=theme.muted, labelsize=8, length=0)


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", facecolor=figure.get_facecolor(), metadata={"Software": None})
    return buffer.getvalue()
