"""The charts of compare.html: damage against size, the quantiles beside the mean, and damage by domain and by how sure the reference was.

Each is drawn for a desk and for a phone. Shape and colour say what kind of file it is; its name stands at its mark or in its row.
Left out: differences of pairs; their table says them better.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from markupsafe import Markup

from bitatlas.records import Measured
from bitatlas.records.comparison import Candidate, Comparison, Deviation
from bitatlas.records.text import byte_size, interval, listed, number, percent
from bitatlas.report.charts.canvas import Canvas, Scale, linear, log_range, logarithmic, nice_range, tick_text, ticks
from bitatlas.report.charts.charts import BYTE_UNITS, Row, forest
from bitatlas.report.charts.figures import NARROW, WIDE, Keys
from bitatlas.report.charts.labels import FAR, LINE, Box, Labels, fit, letter, near_end, short_names, text_width
from bitatlas.report.facts import wilson_text

FAMILY_MARKS = (
    ("circle", "c-high", "●"),
    ("square", "c-low", "■"),
    ("diamond", "c-plan", "◆"),
    ("triangle", "c-ink", "▲"),
    ("down", "c-baseline", "▼"),
    ("plus", "v-safe", "✚"),
    ("star", "v-light", "★"),
)
NOISE_MARK = ("square", "c-muted", "■")
QUANTILE_MARKS = (
    ("circle", "c-high", "●"),
    ("square", "c-ink", "■"),
    ("diamond", "c-plan", "◆"),
    ("triangle", "c-low", "▲"),
)
NOISE_NAME = "noise floor"
WIDE_RANGE = 5.0  # largest over smallest size, from which sizes stand on a log axis
LEAST_SHOWN = 20.0  # an interval's lower end is drawn down to this part of the mean, so that one near 0 does not stretch the axis
DECADES = 7  # that a log axis shows at most


@dataclass(frozen=True)
class Drawn:
    """A chart in both widths, with its words. wide_letters, narrow_letters: whether its marks bear letters, which a list below explains."""

    title: str
    caption: str
    wide: Markup
    narrow: Markup
    keys: Keys
    wide_letters: bool = False
    narrow_letters: bool = False
    names: list[tuple[str, str]] = field(default_factory=list)


@dataclass(frozen=True)
class Lane:
    """One line of a chart of several files: what it is called, and its mark."""

    name: str
    shape: str
    css: str


@dataclass(frozen=True)
class Strip:
    """One column of small plots: a value for each lane."""

    title: str
    note: str
    values: list[Measured | None]


def seen_in(candidate: Candidate) -> Deviation:
    """Return what was found of a candidate that was compared on text."""
    assert candidate.deviation is not None
    return candidate.deviation


def ranked(comparison: Comparison) -> list[Candidate]:
    """Return the candidates that were compared on text, in their order."""
    return [candidate for candidate in comparison.candidates if candidate.deviation is not None]


def family_marks(comparison: Comparison) -> dict[str, tuple[str, str, str]]:
    """Return (shape, css class, sign) of each kind of file."""
    families = sorted({candidate.file.family for candidate in comparison.candidates})
    return {family: FAMILY_MARKS[index % len(FAMILY_MARKS)] for index, family in enumerate(families)}


def figures(comparison: Comparison) -> dict[str, Drawn]:
    """Return the figures that this comparison has, by the name that the template uses."""
    result = _text_figures(comparison) if ranked(comparison) else {}
    if comparison.tasks:
        caption = "Right answers on the same items. Bars: 95% Wilson intervals; the dotted tick is chance."
        result["tasks"] = Drawn("Accuracy", caption, tasks(comparison, WIDE), tasks(comparison, NARROW), [])
    return result


def _text_figures(comparison: Comparison) -> dict[str, Drawn]:
    result: dict[str, Drawn] = {}
    seen = {candidate.file.family for candidate in ranked(comparison)}
    families: Keys = [(sign, css, family) for family, (_, css, sign) in family_marks(comparison).items() if family in seen]
    result["front"] = _front_figure(comparison, families)
    noise: Keys = [(NOISE_MARK[2], NOISE_MARK[1], NOISE_NAME)] if comparison.noise else []
    percents = quantile_percents(comparison)
    result["quantiles"] = Drawn(
        "Most tokens, and the worst of them",
        f"KL of single tokens: {listed(f'{percent} %' for percent in percents)} of the tokens have at most so much. Bars: 95% intervals.",
        quantiles(comparison, WIDE),
        quantiles(comparison, NARROW),
        [
            (sign, css, f"{percent} % of tokens")
            for percent, (_, css, sign) in zip(percents, QUANTILE_MARKS * len(percents), strict=False)
        ],
    )
    for key, title, caption, strips in (
        (
            "sure",
            "Damage by how sure the reference was",
            "Tokens by the probability that the reference gives its most probable one. Bars: 95% intervals; one log axis for all.",
            sure_strips(comparison),
        ),
        ("domains", "Damage by domain", "Bars: 95% intervals; one log axis for all.", domain_strips(comparison)),
    ):
        if strips:
            lanes, label = lanes_of(comparison), "damage, nats/token (log)"
            wide, narrow = (trellis(lanes, strips, width, f"{title}: {label}", label) for width in (WIDE, NARROW))
            result[key] = Drawn(title, caption, wide, narrow, families + noise)
    return result


# --- axes --------------------------------------------------------------------------------------------------------------


def ends_of(m: Measured) -> tuple[float, float]:
    """Return the ends of an interval; the mean where there is none."""
    return m.ci95 or (m.mean, m.mean)


def damage_range(values: Sequence[Measured]) -> tuple[float, float]:
    """Return a log axis's range for means and intervals."""
    ends = [end for m in values for end in (m.mean, max(ends_of(m)[0], m.mean / LEAST_SHOWN), ends_of(m)[1])]
    most = max(ends, default=1.0)
    return log_range([end for end in ends if end >= most / 10**DECADES])


def spaced_ticks(low: float, high: float, scale: Scale, upwards: float = 0.0) -> list[float]:
    """Return ticks of a log axis whose numbers do not touch when they stand side by side, or so many px above each other."""

    def apart(values: Sequence[float]) -> bool:
        need = [upwards or text_width(tick_text(value)) / 2 + 4 for value in values]
        gaps = [abs(scale(after) - scale(before)) for before, after in pairwise(values)]
        return all(gap >= (upwards or one + other) for gap, (one, other) in zip(gaps, pairwise(need), strict=True))

    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    values: list[float] = []
    for steps in ((1, 2, 5), (1, 3), (1,)):
        tried = [step * 10.0**e for e in exponents for step in steps if low <= step * 10.0**e <= high]
        values = tried if len(tried) > 1 or not values else values
        if apart(values):
            return values
    return next(values[::every] for every in range(2, len(values) + 2) if apart(values[::every]))


def draw_mark(c: Canvas, x: float, y: float, shape: str, css: str, words: str, size: float = 5) -> None:
    """Draw a mark with its tooltip: one of the canvas's shapes, or a triangle on its tip, a plus, a star."""
    s = size
    paths = {
        "down": f"M{x:.1f} {y + 1.2 * s:.1f}l{-1.2 * s:g} {-2.1 * s:g}h{2.4 * s:g}z",
        "plus": f"M{x - 0.4 * s:.1f} {y - 1.2 * s:.1f}h{0.8 * s:g}v{0.8 * s:g}h{0.8 * s:g}v{0.8 * s:g}h{-0.8 * s:g}v{0.8 * s:g}"
        f"h{-0.8 * s:g}v{-0.8 * s:g}h{-0.8 * s:g}v{-0.8 * s:g}h{0.8 * s:g}z",
        "star": "M" + "L".join(f"{x + r * math.sin(a):.1f} {y - r * math.cos(a):.1f}" for r, a in _star(s)) + "z",
    }
    if shape not in paths:
        c.mark(x, y, shape, css, words, size)
        return
    with c.tip(words):
        c.add(f'<circle class="target" cx="{x:.1f}" cy="{y:.1f}" r="{s + 5:g}"/><path class="{css}" d="{paths[shape]}"/>')


def _star(size: float) -> list[tuple[float, float]]:
    return [((1.4 if i % 2 == 0 else 0.6) * size, math.pi * i / 5) for i in range(10)]


# --- damage against size -------------------------------------------------------------------------------------------------


def _front_figure(comparison: Comparison, families: Keys) -> Drawn:
    (wide, wide_letters), (narrow, narrow_letters) = (front(comparison, width) for width in (WIDE, NARROW))
    caption = "Lower left is better. Bars: 95% intervals"
    caption += "; the line joins the front." if sum(c.on_front for c in ranked(comparison)) > 1 else "."
    if comparison.noise:
        caption += " Dashed: the noise floor with its interval."
    if any(seen_in(candidate).damage.mean <= 0 for candidate in ranked(comparison)):
        caption += " A damage of 0 stands at the lower edge."
    names = [(letter(index), candidate.file.name) for index, candidate in enumerate(ranked(comparison))]
    return Drawn("Damage against size", caption, wide, narrow, families, wide_letters, narrow_letters, names)


def front(comparison: Comparison, width: int) -> tuple[Markup, bool]:
    """Draw damage (log) against the size of each file, the front joined; return whether letters stand for the names, where these have no room."""
    candidates, noise = ranked(comparison), comparison.noise
    c = Canvas(width, 440 if width > 500 else 380, left=62, right=70 if width > 500 else 22, top=30, bottom=44)
    x, unit = _size_axis(c, [candidate.file.bytes for candidate in candidates], width > 500)
    damages = [seen_in(candidate).damage for candidate in candidates]
    low, high = damage_range(damages + ([noise.damage] if noise else []))
    y = logarithmic(low, high, c.y0, c.y1)
    c.y_axis(y, spaced_ticks(low, high, y, upwards=26), "damage, nats/token (log)")
    points = [(x(candidate.file.bytes / unit), y(m.mean)) for candidate, m in zip(candidates, damages, strict=True)]
    taken = [_noise_line(c, y, noise, points)] if noise else []
    line = sorted(
        (candidate.file.bytes, point) for candidate, point in zip(candidates, points, strict=True) if candidate.on_front
    )
    c.path([point for _, point in line], "join front")
    marks = family_marks(comparison)
    bars = [Box(c.x0, y(noise.damage.mean) - 1, c.x1, y(noise.damage.mean) + 1)] if noise else []
    for candidate, m, (px, py) in zip(candidates, damages, points, strict=True):
        bottom, top = (y(end) for end in ends_of(m))
        bars.append(Box(px - 3, top, px + 3, bottom))
        shape, css, _ = marks[candidate.file.family]
        if m.ci95:
            c.whisker(px, bottom, top, css)
        draw_mark(c, px, py, shape, css, _words(candidate), 5.5 if candidate.on_front else 4.5)
    letters = _write_names(c, candidates, points, taken, [*bars, *_along([point for _, point in line])])
    return c.svg(f"Damage against size of {len(candidates)} files, log damage axis, with 95% intervals"), letters


def _size_axis(c: Canvas, sizes: Sequence[int], wide: bool) -> tuple[Scale, float]:
    """Draw the axis of sizes, log where they are far apart; return its scale and its unit in bytes."""
    unit, name = next(pair for pair in BYTE_UNITS if max(sizes) >= pair[0])
    values = [size / (unit or 1) for size in sizes]
    if min(values) > 0 and max(values) / min(values) > WIDE_RANGE:
        low, high = min(values) / 1.2, max(values) * 1.2
        x = logarithmic(low, high, c.x0, c.x1)
        c.x_axis(x, spaced_ticks(low, high, x), f"size of the file, {name} (log)", grid=True)
    else:
        low, high = nice_range(values)
        x = linear(low, high, c.x0, c.x1)
        c.x_axis(x, ticks(low, high, 6 if wide else 3), f"size of the file, {name}", grid=True)
    return x, unit or 1


def _noise_line(c: Canvas, y: Scale, noise: Deviation, points: Sequence[tuple[float, float]]) -> Box:
    """Draw the noise floor, with its interval as a band; return where its name stands: at the end of the line with fewer marks."""
    at, (bottom, top) = y(noise.damage.mean), (y(end) for end in ends_of(noise.damage))
    with c.tip(f"{NOISE_NAME}: {interval(noise.damage, unit=True)}"):
        c.rect(c.x0, top, c.x1 - c.x0, max(1.0, bottom - top), "zone zone-1")
        c.line(c.x0, at, c.x1, at, "rule")
    room = text_width(NOISE_NAME)
    boxes = [
        Box(left, edge, left + room, edge + LINE)
        for edge in (top - LINE - 3, bottom + 4)
        for left in (c.x1 - room - 2, c.x0 + 4)
        if c.y1 - 6 <= edge <= c.y0 - LINE
    ]
    free = min(boxes, key=lambda box: sum(box.over(Box(px - 9, py - 9, px + 9, py + 9)) for px, py in points))
    c.text(free.left, free.bottom - 3, NOISE_NAME, "label note")
    return free


def _along(points: Sequence[tuple[float, float]]) -> list[Box]:
    """Return small boxes along a line, which labels should rather not lie over."""
    boxes = []
    for (x1, y1), (x2, y2) in pairwise(points):
        steps = max(1, round(math.hypot(x2 - x1, y2 - y1) / 12))
        for i in range(1, steps):
            x, y = x1 + (x2 - x1) * i / steps, y1 + (y2 - y1) * i / steps
            boxes.append(Box(x - 1, y - 1, x + 1, y + 1))
    return boxes


def _write_names(
    c: Canvas,
    candidates: Sequence[Candidate],
    points: Sequence[tuple[float, float]],
    taken: Sequence[Box],
    avoided: Sequence[Box],
) -> bool:
    """Write each file's name at its mark; return whether letters had to stand for them."""
    frame = Box(c.x0 + 1, c.y1 - 12, c.width - 3, c.y0 - 2)
    full = short_names([candidate.file.name for candidate in candidates], 190 if c.width > 500 else 108)
    single = [letter(index) for index in range(len(candidates))]
    for texts in (full, single) if c.width > 500 or len(candidates) <= 6 else (single,):
        widths = [text_width(text) for text in texts]
        places = Labels(points, widths, frame, taken, avoided).placed()
        if places is None:
            continue
        for mark, text, width, place, candidate in zip(points, texts, widths, places, candidates, strict=True):
            if place.distance >= FAR:
                c.line(*mark, *near_end(mark, place.box), "leader")
            left, centre = place.box.right <= mark[0], place.box.left < mark[0] < place.box.right
            anchor, at = ("end", width) if left else ("middle", width / 2) if centre else ("start", 0.0)
            c.text(place.box.left + at, place.baseline, text, "label strong" if candidate.on_front else "label", anchor)
        return texts is single
    return True  # more marks in one place than even letters have room for: tooltips and tables have them


def _words(candidate: Candidate) -> str:
    marks = [*(["on the front"] if candidate.on_front else []), *(["within the noise floor"] if candidate.within_noise else [])]
    return (
        f"{candidate.file.name}: {interval(seen_in(candidate).damage, unit=True)}; {byte_size(candidate.file.bytes)}, "
        f"{number(candidate.file.bits, 2)} bits a weight; {', '.join([f'rank {candidate.rank}', *marks])}"
    )


# --- one line a file -------------------------------------------------------------------------------------------------------


def lanes_of(comparison: Comparison) -> list[Lane]:
    """Return a line for each file, and the last for the noise floor."""
    marks = family_marks(comparison)
    lanes = [Lane(candidate.file.name, *marks[candidate.file.family][:2]) for candidate in ranked(comparison)]
    return lanes + ([Lane(NOISE_NAME, *NOISE_MARK[:2])] if comparison.noise else [])


def lane_names(lanes: Sequence[Lane], room: float) -> list[str]:
    """Return what stands at each line, within so many px."""
    files = [lane.name for lane in lanes if lane.css != NOISE_MARK[1]]
    return short_names(files, room) + [lane.name for lane in lanes[len(files) :]]


def deviations(comparison: Comparison) -> list[Deviation]:
    """Return what was found of each lane."""
    return [seen_in(candidate) for candidate in ranked(comparison)] + ([comparison.noise] if comparison.noise else [])


def quantile_percents(comparison: Comparison) -> list[str]:
    """Return the percents of the quantiles that any file has, rising."""
    return sorted({percent for deviation in deviations(comparison) for percent in deviation.quantiles}, key=float)


def domain_strips(comparison: Comparison) -> list[Strip]:
    """Return a column for each domain."""
    found = deviations(comparison)
    return [
        Strip(domain.name, f"{domain.tokens:,} tokens", [deviation.domains.get(domain.name) for deviation in found])
        for domain in comparison.domains
        if any(domain.name in deviation.domains for deviation in found)
    ]


def bucket_name(low: float, high: float) -> str:
    """Return `10–30 %`: between which probabilities the reference's greatest lies."""
    return f"{number(100 * low, 0)}–{number(100 * high, 0)} %"


def sure_strips(comparison: Comparison) -> list[Strip]:
    """Return a column for each range of the reference's greatest probability."""
    found = deviations(comparison)
    return [
        Strip(
            bucket_name(bucket.low, bucket.high),
            f"{percent(bucket.share)} of tokens",
            [next((b.damage for b in deviation.buckets if b.low == bucket.low), None) for deviation in found],
        )
        for bucket in (found[0].buckets if found else ())
        if bucket.share > 0
    ]


def trellis(lanes: Sequence[Lane], strips: Sequence[Strip], width: int, title: str, label: str) -> Markup:
    """Draw small plots beside each other with one line a file and one log axis for all; as many in a row as are readable."""
    wide = width > 500
    room, pitch, gap = (168.0, 22.0, 22.0) if wide else (112.0, 19.0, 12.0)
    most = max(1, int((width - room) / (150 if wide else 200)))
    bands = math.ceil(len(strips) / most)
    columns = math.ceil(len(strips) / bands)
    each = (width - room - 14 - 18) / columns
    high_of = 38 + pitch * len(lanes) + 26
    c = Canvas(width, int(bands * high_of + 24), left=room + 14)
    limits = damage_range([m for strip in strips for m in strip.values if m is not None])
    names = lane_names(lanes, room)
    for index, strip in enumerate(strips):
        band, column = divmod(index, columns)
        top = band * high_of + 38
        if column == 0:
            for number_, name in enumerate(names):
                c.text(room, top + pitch * (number_ + 0.5) + 4, name, "label", "end")
        x0 = room + 14 + column * each
        scale = logarithmic(*limits, x0, x0 + each - gap)
        _small_plot(c, strip, lanes, scale, limits, Box(x0, top, x0 + each - gap, top + pitch * len(lanes)))
    c.text(c.x0 + (width - c.x0 - 18) / 2, bands * high_of + 14, label, "axis", "middle")
    return c.svg(title)


def _small_plot(c: Canvas, strip: Strip, lanes: Sequence[Lane], scale: Scale, limits: tuple[float, float], box: Box) -> None:
    room = box.right - box.left
    c.text(box.left, box.top - 22, fit(strip.title, room), "heading")
    c.text(box.left, box.top - 8, fit(strip.note, room), "note")
    pitch = (box.bottom - box.top) / len(lanes)
    for index in range(0, len(lanes), 2):
        c.rect(box.left, box.top + index * pitch, room, pitch, "zone zone-0")
    for value in spaced_ticks(*limits, scale):
        x = scale(value)
        c.line(x, box.top, x, box.bottom, "grid")
        if box.left - 10 <= x - text_width(tick_text(value)) / 2 and x + text_width(tick_text(value)) / 2 <= box.right + 10:
            c.text(x, box.bottom + 15, tick_text(value), "tick", "middle")
    c.line(box.left, box.bottom, box.right, box.bottom, "base")
    for index, (lane, m) in enumerate(zip(lanes, strip.values, strict=True)):
        if m is None:
            continue
        y = box.top + pitch * (index + 0.5)
        if m.ci95:
            c.whisker_across(y, scale(m.ci95[0]), scale(m.ci95[1]), lane.css)
        draw_mark(c, scale(m.mean), y, lane.shape, lane.css, f"{lane.name}, {strip.title}: {interval(m, unit=True)}", 4)


def quantiles(comparison: Comparison, width: int) -> Markup:
    """Draw the quantiles of the KL of tokens, one line a file: on a phone below its name."""
    lanes, found, percents = lanes_of(comparison), deviations(comparison), quantile_percents(comparison)
    wide = width > 500
    room, pitch = (168.0, 27.0) if wide else (0.0, 38.0)
    c = Canvas(width, int(pitch * len(lanes) + 56), left=room + 14 if wide else 12, right=26, top=8, bottom=42)
    low, high = damage_range([m for deviation in found for m in deviation.quantiles.values()])
    x = logarithmic(low, high, c.x0, c.x1)
    c.x_axis(x, spaced_ticks(low, high, x), "KL of a token, nats (log)", grid=True)
    names = lane_names(lanes, room if wide else width - 30)
    for index, (lane, name, deviation) in enumerate(zip(lanes, names, found, strict=True)):
        y = c.y1 + pitch * index + (pitch / 2 if wide else 27)
        c.text(room if wide else 2, y + 4 if wide else y - 13, name, "label", "end" if wide else "start")
        here = [deviation.quantiles[p].mean for p in percents if p in deviation.quantiles]
        if here:
            c.line(x(min(here)), y, x(max(here)), y, "join")
        for p, (shape, css, _) in zip(percents, QUANTILE_MARKS * len(percents), strict=False):
            m = deviation.quantiles.get(p)
            if m is not None:
                if m.ci95:
                    c.whisker_across(y, x(m.ci95[0]), x(m.ci95[1]), css)
                draw_mark(c, x(m.mean), y, shape, css, f"{lane.name}, {p} % of tokens: {interval(m, unit=True)} at most", 4.5)
    return c.svg("Quantiles of the KL of single tokens, log axis, with 95% intervals")


def tasks(comparison: Comparison, width: int) -> Markup:
    """Draw the accuracy of the reference and of each file with its Wilson interval; a tick marks chance."""
    marks = {candidate.file.name: _mark_of(comparison, candidate) for candidate in comparison.candidates}
    order: Callable[[str], int] = list(dict.fromkeys(score.task for score in comparison.tasks)).index
    room = 200 if width > 500 else 170
    names = [comparison.reference.name, *marks]
    short = dict(zip(names, ["the reference", *short_names(names[1:], room)], strict=True))
    rows: list[Row] = []
    seen = ""
    for score in sorted(comparison.tasks, key=lambda s: (order(s.task), names.index(s.precision))):
        shape, css = marks.get(score.precision, ("square", "c-muted"))
        low, high = (100 * end for end in score.wilson95)
        mean = 100 * score.correct / max(1, score.n)
        heading = "" if score.task == seen else fit(score.task, 250)
        seen = score.task
        value = f"{number(mean, 1)}% {wilson_text(score)}"
        rows.append(Row(short[score.precision], mean, (low, high), css, shape, value, 100 * score.chance, heading))
    return forest(rows, width, "linear", (0.0, 100.0), "accuracy, %")


def _mark_of(comparison: Comparison, candidate: Candidate) -> tuple[str, str]:
    """Return the shape, one that the canvas has, and the css class of a file."""
    shape, css, _ = family_marks(comparison).get(candidate.file.family, NOISE_MARK)
    return (
        shape if shape in ("circle", "square", "diamond", "triangle") else "circle"
    ), f"{css} file"  # not the plan of `forest`
