"""The report as HTML: takes a `Tally`, gives one page and the PNG pictures in it."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape as _escape
from typing import Any

import numpy as np

from smi import report_figures as figures
from smi.report_data import ClassTally, Picture, Tally

_CLASSES_SHOWN = 24

_STYLE = """
:root { color-scheme: light dark; --page: #fbfaf7; --ink: #23262a; --muted: #6d7278; --line: #dcd8cf;
  --accent: #2f7196; --soft: #f1eee6; --mark: #b4552d; }
@media (prefers-color-scheme: dark) { :root { --page: #15171a; --ink: #e4e2dc; --muted: #979ca3; --line: #33373d;
  --accent: #6fb1d6; --soft: #1d2024; --mark: #e08a5f; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.6 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
main { max-width: 1020px; margin: 0 auto; padding: 56px 28px 96px; }
h1, h2, h3 { font-family: "Iowan Old Style", "Palatino Linotype", Palatino, "Book Antiqua", Georgia, serif;
  font-weight: 600; line-height: 1.2; letter-spacing: -0.01em; }
h1 { font-size: 2.1rem; margin: 0 0 6px; overflow-wrap: anywhere; }
h2 { font-size: 1.4rem; margin: 64px 0 8px; }
h3 { font-size: 1.05rem; margin: 28px 0 4px; }
p { margin: 8px 0; max-width: 72ch; }
.lead, figcaption, .note { color: var(--muted); }
figcaption, .note { font-size: 0.88rem; line-height: 1.55; max-width: 84ch; }
figure { margin: 20px 0 0; }
figure > figcaption { margin-top: 10px; }
img { display: block; max-width: 100%; }
.plot { width: 100%; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(168px, 1fr)); gap: 1px; margin: 32px 0 0;
  background: var(--line); border: 1px solid var(--line); border-radius: 8px; overflow: hidden; }
.tile { background: var(--page); padding: 16px 18px; }
.tile .name { font-size: 0.8rem; color: var(--muted); }
.tile .value { font-size: 1.65rem; line-height: 1.35; font-variant-numeric: tabular-nums; }
.tile .more { font-size: 0.8rem; line-height: 1.4; color: var(--muted); }
.stages { margin-top: 20px; }
.row { display: grid; grid-template-columns: 148px minmax(0, 1fr); gap: 18px; align-items: center; margin-top: 10px; }
.row .label { font-size: 0.88rem; line-height: 1.35; overflow-wrap: anywhere; }
.row .label span, .cell span { color: var(--muted); font-size: 0.8rem; }
.row .heads { display: grid; font-size: 0.8rem; line-height: 1.3; color: var(--muted); }
.row .heads b { color: var(--ink); font-weight: 600; }
.row img { width: 100%; image-rendering: pixelated; border-radius: 3px; }
.gallery { display: grid; grid-template-columns: repeat(auto-fill, minmax(132px, 1fr)); gap: 20px 16px;
  margin-top: 20px; }
.stages + .note, .gallery + .note, .scroll + .note { margin-top: 16px; }
.cell { margin: 0; font-size: 0.88rem; line-height: 1.35; overflow-wrap: anywhere; }
.cell img { width: 100%; max-width: 180px; image-rendering: pixelated; border-radius: 3px; margin-bottom: 6px; }
.wrong { color: var(--mark) !important; }
.scroll { overflow-x: auto; margin-top: 20px; }
table { border-collapse: collapse; width: 100%; font-size: 0.9rem; font-variant-numeric: tabular-nums; }
th, td { padding: 6px 14px 6px 0; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { font-weight: 600; font-size: 0.8rem; color: var(--muted); vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; }
td:first-child { white-space: normal; overflow-wrap: anywhere; }
td:last-child, th:last-child { padding-right: 0; }
tr.total td { font-weight: 600; border-bottom: 0; }
tr.dense td { color: var(--muted); border-bottom: 0; }
td.bar { min-width: 132px; }
.meter { display: grid; grid-template-columns: 1fr 6.5ch; gap: 8px; align-items: center; }
.meter i { display: block; height: 8px; border-radius: 4px; background: var(--soft); overflow: hidden; }
.meter i b { display: block; height: 100%; background: var(--accent); }
details { margin-top: 24px; border-top: 1px solid var(--line); padding-top: 14px; }
summary { cursor: pointer; font-weight: 600; }
.card td { text-align: left; white-space: normal; overflow-wrap: anywhere; vertical-align: top; }
.card td:first-child { color: var(--muted); width: 220px; }
.card code { font-size: 0.85rem; }
@media (max-width: 640px) { main { padding: 32px 16px 64px; }
  .row { grid-template-columns: minmax(0, 1fr); gap: 4px; } .row + .row { margin-top: 18px; } }
@media print { details > * { display: block; } h2 { break-after: avoid; } figure, .row { break-inside: avoid; } }
"""


def render(tally: Tally, manifest: Mapping[str, Any], *, planned: int) -> tuple[str, dict[str, bytes]]:
    """The page and the PNG files it shows, by a name without extension.

    Args:
        tally: of at least one batch.
        manifest: of the pool, for the data card.
        planned: images of the whole work plan.
    """
    page = _Page(tally, manifest.get("objectives") or ())
    model = _text(tally.info.name)
    body = "\n".join(
        [
            *page.headline(planned),
            *page.stages(),
            *page.drops(),
            *page.curves(),
            *page.agreement(),
            *page.costs(),
            *page.limits(),
            *_data_card(tally, manifest),
        ]
    )
    html = (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{model}: synthetic images</title>\n<style>{_STYLE}</style>\n</head>\n"
        f"<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )
    return html, page.files


class _Page:
    """The sections in order; every picture drawn on the way is kept in `files`.

    Args:
        losses: `smi.Objective.identity` of those beyond the config's.
    """

    def __init__(self, tally: Tally, losses: Sequence[str]) -> None:
        self.tally, self.losses = tally, losses
        self.summary = tally.summary()
        self.prunings = sorted(tally.prunings)
        self.files: dict[str, bytes] = {}

    def headline(self, planned: int) -> Iterator[str]:
        s, config, info = self.summary, self.tally.config, self.tally.info
        yield f"<h1>Synthetic images from {_text(info.name)}</h1>"
        done = _count(s["images"], "image")
        if s["images"] < planned:
            done = f"{s['images']:,} of {planned:,} planned images"
        geometry = f"{info.input_size[2]} × {info.input_size[1]} pixels, {info.num_patches} patches"
        how = {
            "rebirth": f" ({config.division} images of each trajectory)",
            "fusion": f" (tokens merged to {config.merge_to:.0%} of the patches)",
        }.get(config.strategy, "")
        losses = f" Losses beyond the config's: {_text(', '.join(self.losses))}." if self.losses else ""
        yield (
            f'<p class="lead">{done} of {_count(s["classes"], "class", "classes")}, {geometry}. Strategy '
            f"<b>{_text(config.strategy)}</b>{how}, <b>{_text(config.semantics)}</b> semantics.{losses}</p>"
        )
        yield '<div class="tiles">'
        yield _tile("teacher agreement", _percent(s["teacher_agreement"]), "argmax of the stored logits is the target")
        judge = s["judge_agreement"]
        if judge:
            more = f"whole image; dropped patches set to the mean: {_percent(judge['mean'])}"
            yield _tile("judge agreement", _percent(judge["as-is"]), more if self.prunings else "whole image")
        flops, tokens = _si(s["flops"], "FLOP"), _si(s["tokens"])
        dense = config.strategy == "dense"
        if s["flops_ratio"] is not None and not dense:
            more = f"{flops} counted, dense {_si(s['flops_dense'], 'FLOP')}"
            yield _tile("FLOPs against dense", _percent(s["flops_ratio"]), more)
        elif s["flops"]:
            yield _tile("FLOPs", flops, "counted" if dense else "counted; dense is not known")
        if s["tokens_ratio"] is not None and not dense:
            more = f"{tokens} tokens counted, dense {_si(s['tokens_dense'])}"
            yield _tile("tokens against dense", _percent(s["tokens_ratio"]), more)
        elif s["tokens"]:
            yield _tile("tokens", tokens, "counted")
        pace = f"measured; {_duration(s['seconds'] / s['images'])} an image"
        yield _tile("time of the updates", _duration(s["seconds"]), pace)
        yield "</div>"

    def stages(self) -> Iterator[str]:
        pictures = self.tally.pictures
        if not pictures:
            return
        columns = max(len(p.frames) for p in pictures)
        yield "<h2>Images over the pruning stages</h2>" if columns > 1 else "<h2>Images</h2>"
        for picture in pictures:
            self.files[f"stages-{picture.index:06d}"] = figures.strip(picture, columns)
        yield from self._rows(columns) if columns > 1 else self._gallery()
        yield f'<p class="note">{" ".join(self._stage_notes(columns))}</p>'

    def _stage_notes(self, columns: int) -> Iterator[str]:
        config, shown, images = self.tally.config, len(self.tally.pictures), self.tally.images
        if not self.prunings:
            yield "Every patch was fed to the end, nothing is dimmed."
        elif columns > 1:
            yield "Dimmed patches were dropped at that iteration or before; stages are pictured as their pruning began."
        else:
            yield "Dimmed patches were dropped on the way."
        if self.prunings and config.strategy == "rebirth":
            yield (
                f"A dropped patch has gone to another image of its trajectory; the {config.division} images of one "
                "follow each other."
            )
        if self.prunings and config.result_mask == "reranked":
            yield (
                "The result shows the stored mask instead, which was ranked once more on a dense pass over the final "
                "image and so need not be the patches that were fed last."
            )
        if config.best:
            yield "The result is each image's best iterate, not its last."
        yield "Under each name: image number and the teacher's probability of that class for the result."
        if shown < images:
            kept = ", the first of each batch, as the pool keeps pictures of these" if config.snapshots else ""
            yield f"Shown: {shown} of {images:,} images{kept}."

    def _rows(self, columns: int) -> Iterator[str]:
        pictures = self.tally.pictures
        longest = max(pictures, key=lambda p: len(p.frames))
        cell = longest.frames[0].pixels.shape
        gap = 100 * figures.GAP / (columns * (_cell_width(cell) + figures.GAP) - figures.GAP)
        heads = [
            f"<div><b>iteration {f.iteration}</b><br>{_count(int(f.live.sum()), 'patch', 'patches')}</div>"
            for f in longest.frames
        ]
        last = _count(int(longest.frames[-1].live.sum()), "patch", "patches")
        heads[-1] = f"<div><b>result</b><br>{last}</div>"
        width = columns * 190 + 166
        yield f'<div class="stages" style="max-width: {width}px"><div class="row"><div></div>'
        style = f"grid-template-columns: repeat({columns}, minmax(0, 1fr)); column-gap: {gap:.3f}%"
        yield f'<div class="heads" style="{style}">{"".join(heads)}</div></div>'
        for picture in pictures:
            label, image = self._label(picture), self._image(f"stages-{picture.index:06d}", self._alt(picture))
            yield f'<div class="row"><div class="label">{label}</div>{image}</div>'
        yield "</div>"

    def _gallery(self) -> Iterator[str]:
        yield '<div class="gallery">'
        for picture in self.tally.pictures:
            image = self._image(f"stages-{picture.index:06d}", self._alt(picture))
            yield f'<div class="cell">{image}{self._label(picture)}</div>'
        yield "</div>"

    def _label(self, picture: Picture) -> str:
        name = _text(self.tally.info.label(picture.target))
        text = f"{name}<br><span>#{picture.index} · {_percent(picture.probability)}</span>"
        if picture.predicted != picture.target:
            text += f'<br><span class="wrong">seen as {_text(self.tally.info.label(picture.predicted))}</span>'
        return text

    def _alt(self, picture: Picture) -> str:
        return f"image {picture.index}, {self.tally.info.label(picture.target)}"

    def drops(self) -> Iterator[str]:
        if not self.prunings:
            return
        tally, grid = self.tally, self.tally.info.grid
        yield "<h2>When patches were dropped</h2>"
        share = (tally.survived / tally.images).reshape(grid)
        when = np.full(len(tally.drop_sum), np.nan)
        np.divide(tally.drop_sum, tally.drop_count, out=when, where=tally.drop_count > 0)
        several = len(self.prunings) > 1
        over = f"Means over {tally.images:,} images" if tally.images > 1 else "The one image"
        caption = f"{over}, at each place of the {grid[0]} × {grid[1]} patch grid. "
        if several:
            caption += (
                "Left: how often the patch there was fed to the end. Right: the iteration at which it was dropped, "
                "averaged over the images that dropped it; blank where none did."
            )
        else:
            caption += f"How often the patch there was fed to the end; all others were dropped at {self.prunings[0]}."
        yield from self._figure(
            "dropped-mean",
            "maps of the mean over all images",
            caption + " Over many images, a ranking blind to position gives flat maps.",
            lambda theme: figures.mean_maps(share, when.reshape(grid) if several else None, theme),
        )
        if tally.pictures and tally.images > 1:
            yield from self._figure(
                "dropped-images",
                "one map for each image shown above",
                "The same for single images, numbered as above: which pruning dropped each patch.",
                lambda theme: figures.image_maps(tally.pictures, self.prunings, theme),
            )

    def curves(self) -> Iterator[str]:
        tally = self.tally
        if all(curve.vanishes for curve in tally.curves.values()):
            return
        yield "<h2>Objectives</h2>"
        terms = ("cross_entropy", "tv1", "tv2", "l2")
        weights: dict[str, float] = {n: getattr(tally.config, n) for n in terms}
        batches = "The pool has one batch, so lines have no band."
        if tally.batches > 1:
            batches = f"Line: mean over {tally.batches} batches; band: lowest to highest."
        marks = " Dashed: pruning iterations." if self.prunings else ""
        yield from self._figure(
            "objectives",
            "objectives against iterations",
            "Each objective, unweighted, and their weighted total, averaged over the images of a batch. "
            f"{batches}{marks} The cross-entropy is that of the augmented images on the patches then fed, so it may "
            "jump where patches are dropped. Terms that are zero throughout are left out.",
            lambda theme: figures.loss_curves(tally.curves, weights, self.prunings, theme),
        )

    def agreement(self) -> Iterator[str]:
        tally = self.tally
        judged = tally.judge is not None
        fills = [] if not judged else ["as-is", "mean"] if self.prunings else ["as-is"]
        yield "<h2>Agreement with the target</h2>"
        text = (
            "Teacher: the model that was inverted, on the kept patches, un-augmented. The images were optimised to "
            "please it, so this says that the optimisation worked and no more. "
        )
        if judged:
            dropped = ", dropped patches as the inversion left them (as-is) or replaced by the mean colour (mean)"
            text += (
                f"Judge: a second network, which sees the whole image{dropped if self.prunings else ''}; it is a "
                "witness only where no objective used it. Guessing among "
                f"{_count(tally.info.num_classes, 'class', 'classes')} would agree with "
                f"{_percent(1 / tally.info.num_classes)}."
            )
        else:
            text += "No second network judged these images."
        yield f'<p class="note">{text}</p>'
        heads = ["class", "images", "teacher", "mean probability", *(f"judge, {fill}" for fill in fills)]
        if judged and not self.prunings:
            heads[-1] = "judge"
        rows = sorted(tally.classes.items())
        if len(rows) <= _CLASSES_SHOWN:
            yield self._classes(heads, rows, fills)
            return
        hardest = sorted(rows, key=lambda item: (_key(item[1], judged), item[0]))[:_CLASSES_SHOWN]
        by = "judge, as-is, then teacher" if judged else "teacher"
        yield f'<p class="note">The {_CLASSES_SHOWN} of {len(rows)} classes with the lowest agreement ({by}):</p>'
        yield self._classes(heads, hardest, fills)
        yield f"<details><summary>All {len(rows)} classes</summary>{self._classes(heads, rows, fills)}</details>"

    def _classes(self, heads: Sequence[str], rows: Iterable[tuple[int, ClassTally]], fills: Sequence[str]) -> str:
        def cells(label: str, count: ClassTally) -> str:
            shares = [count.teacher / count.images, count.probability / count.images]
            shares += [count.judge[fill] / count.images for fill in fills]
            bars = "".join(f'<td class="bar">{_meter(s)}</td>' for s in shares)
            return f"<td>{label}</td><td>{count.images:,}</td>{bars}"

        every = self.tally.classes.values()
        total = ClassTally(
            self.tally.images,
            sum(c.teacher for c in every),
            sum(c.probability for c in every),
            {fill: sum(c.judge[fill] for c in every) for fill in fills},
        )
        body = "".join(f"<tr>{cells(_text(self.tally.info.label(t)), c)}</tr>" for t, c in rows)
        head = "".join(f"<th>{h}</th>" for h in heads)
        return (
            f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}'
            f'<tr class="total">{cells("all", total)}</tr></tbody></table></div>'
        )

    def costs(self) -> Iterator[str]:
        tally, s = self.tally, self.summary
        if not tally.phases:
            return
        patches, images = tally.info.num_patches, tally.images
        yield "<h2>What it cost</h2>"
        heads = ["iterations", "patches fed", "seconds", "s / iteration", "FLOPs", "tokens"]
        body = ""
        for phase in sorted(tally.phases.values(), key=lambda p: (p.start, -p.kept)):
            first, last = min(phase.stops), max(phase.stops)
            until = f"{last - 1}" if first == last else f"{first - 1} to {last - 1}"
            cells = [
                f"{phase.start} – {until}",
                f"{phase.kept} of {patches}",
                f"{phase.seconds:,.2f}",
                f"{phase.seconds / phase.iterations:.4f}",
                _si(phase.flops) if phase.flops else "–",
                _si(phase.tokens),
            ]
            body += f"<tr>{_cells(cells)}</tr>"
        iterations = sum(p.iterations for p in tally.phases.values())
        spent = ["spent", "", f"{s['seconds']:,.2f}", f"{s['seconds'] / iterations:.4f}"]
        body += f'<tr class="total">{_cells([*spent, _si(s["flops"]) if s["flops"] else "–", _si(s["tokens"])])}</tr>'
        if tally.config.strategy != "dense":
            known = _si(s["flops_dense"]) if s["flops_dense"] is not None else "not known"
            dense = ["dense, same iterations", f"{patches} of {patches}", "not run", "–", known, _si(s["tokens_dense"])]
            flops, tokens = (_percent(s[n]) if s[n] is not None else "–" for n in ("flops_ratio", "tokens_ratio"))
            ratio = ["spent / dense", "", "", "", flops, tokens]
            body += f'<tr class="dense">{_cells(dense)}</tr><tr class="dense">{_cells(ratio)}</tr>'
        head = "".join(f"<th>{h}</th>" for h in heads)
        yield f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
        note = (
            f"Sums over {_count(tally.batches, 'batch', 'batches')} with {_count(images, 'image')}; s / iteration is "
            "for one batch. <b>Seconds</b> are measured: wall-clock time of the update loop on the device named in the "
            "data card, without loading the model, the closing evaluation and writing files. <b>FLOPs</b> are counted, "
            "not measured: matrix products, convolutions and attention of the forward pass and of the gradient with "
            "respect to the images, a multiply-add as two. <b>Tokens</b> are counted: patches fed plus "
            f"{_count(tally.info.num_prefix_tokens, 'prefix token')}, for each image and iteration."
        )
        if tally.config.strategy == "fusion":
            note += (
                f" Tokens are merged inside the network, to {tally.config.merge_to:.0%} of the patches in front of the "
                "last block: the FLOPs count that, the tokens do not."
            )
        elif tally.config.strategy != "dense":
            note += (
                " <b>Dense</b> is calculated for the same images and iterations with every patch fed: the FLOPs of an "
                "iteration of the first phase, which feeds all patches, times the iterations. It was not run, so its "
                "time is not known."
            )
        yield f'<p class="note">{note}</p>'

    def limits(self) -> Iterator[str]:
        yield "<h2>How to read this, and its limits</h2>"
        yield (
            "<p>These pictures show what the model responds to, under the objectives and the schedule in the data "
            "card. They are not photographs and not samples of its training data, but an optimised image may carry "
            "traits of that data: treat a pool made from a confidential model as you would treat the model.</p>"
        )
        judge = " and of the judge" if self.tally.judge is not None else ""
        yield (
            f"<p>Every number here is computed from this one pool. Agreement of the teacher{judge} is over these "
            "images, without intervals; few images of a class make coarse shares. The page says nothing about the "
            "accuracy of a model quantized or trained with the images, about other seeds, or about the time on another "
            "device.</p>"
        )

    def _figure(self, name: str, alt: str, caption: str, draw: Any) -> Iterator[str]:
        light, dark = draw(figures.LIGHT), draw(figures.DARK)
        self.files[name] = light
        yield (
            f'<figure><picture><source media="(prefers-color-scheme: dark)" srcset="{_data_uri(dark)}">'
            f'<img class="plot" alt="{_text(alt)}" src="{_data_uri(light)}"></picture>'
            f"<figcaption>{caption}</figcaption></figure>"
        )

    def _image(self, name: str, alt: str) -> str:
        return f'<img alt="{_text(alt)}" src="{_data_uri(self.files[name])}">'


def _data_card(tally: Tally, manifest: Mapping[str, Any]) -> Iterator[str]:
    versions = manifest.get("versions", {})
    provenance = {
        "created": manifest.get("created"),
        "device": manifest.get("device"),
        "peak memory": "not measured" if tally.peak_memory is None else f"{tally.peak_memory / 2**20:,.0f} MiB",
        **{f"{name} version": version for name, version in versions.items()},
    }
    model = {k: v for k, v in manifest.get("model", {}).items() if k != "class_names"}
    yield "<details><summary>Data card: model, configuration, provenance</summary>"
    config = {**tally.config.to_dict(), "losses beyond these": manifest.get("objectives") or ()}
    for title, facts in (("Model", model), ("Configuration", config), ("Provenance", provenance)):
        rows = "".join(
            f"<tr><td>{_text(str(k))}</td><td><code>{_text(_plain(v))}</code></td></tr>" for k, v in facts.items()
        )
        yield f'<h3>{title}</h3><table class="card"><tbody>{rows}</tbody></table>'
    yield "</details>"


def _key(count: ClassTally, judged: bool) -> tuple[float, float]:
    teacher = count.teacher / count.images
    return (count.judge["as-is"] / count.images if judged else 0.0, teacher)


def _cell_width(shape: tuple[int, ...]) -> int:
    height, width = shape[:2]
    factor = figures.CELL // max(height, width)
    return width * factor if factor else max(1, round(width * figures.CELL / max(height, width)))


def _tile(name: str, value: str, more: str) -> str:
    return (
        f'<div class="tile"><div class="name">{name}</div><div class="value">{value}</div>'
        f'<div class="more">{more}</div></div>'
    )


def _meter(share: float) -> str:
    return f'<div class="meter"><i><b style="width: {100 * share:.1f}%"></b></i><span>{_percent(share)}</span></div>'


def _cells(values: Iterable[str]) -> str:
    return "".join(f"<td>{value}</td>" for value in values)


def _data_uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()


def _text(text: str) -> str:
    """Anything as the text of an element or attribute; control characters, which HTML forbids, are replaced."""
    return _escape("".join(c if c.isprintable() or c == " " else "\ufffd" for c in text))


def _plain(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value)) or "none"
    return "–" if value is None else str(value)


def _count(number: int, one: str, many: str | None = None) -> str:
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def _percent(share: float) -> str:
    """Never rounds to 0 or 100 what is not."""
    text = f"{100 * share:.1f}"
    if text == "100.0":
        text = "100" if share >= 1 else "99.9"
    elif text == "0.0":
        text = "0" if share <= 0 else "0.1"
    return f"{text} %"


def _si(number: float, unit: str = "") -> str:
    for size, letter in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g} {letter}{unit}"
    return f"{number:g} {unit}".strip()


def _duration(seconds: float) -> str:
    if seconds < 0.1:
        return f"{1000 * seconds:.3g} ms"
    if seconds < 120:
        return f"{seconds:.3g} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"
