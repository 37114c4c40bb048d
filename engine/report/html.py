"""The report as one HTML file: no remote asset, light and dark as the reader's system is.

Text from models stands in the page escaped, and reaches the charts as JSON that the page's script
reads; a content security policy in the page lets nothing run but that script and Vega, by their
hashes, and lets nothing load. The charts are drawn by Vega (https://vega.github.io), whose bundle
comes with the package vl-convert-python.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from html import escape
from importlib import resources
from typing import Any

import orjson

from engine.errors import ConfigError
from engine.languages import ENGLISH
from engine.recipes.base import telling_text
from engine.report.analysis import analyse
from engine.report.charts import charts
from engine.report.pictures import NEEDED, rows_map, verbs
from engine.report.stages import COLUMNS, costs, lines, models
from engine.store import RunReader
from engine.text import counted, in_money, shorten, visible

__all__ = ["document", "html", "policy", "style", "table_of", "vega"]

VEGA_LITE = "6.1"


def html(run: RunReader) -> str:
    """The whole page. Takes some seconds; raises ConfigError where a package is missing."""
    # The parser of the verbs knows English only.
    english = run.manifest.decision.get("language", ENGLISH) == ENGLISH
    return page(analyse(run), {"map": rows_map(run), "verbs": verbs(run) if english else None})


@cache
def vega() -> str:
    """Vega, Vega-Lite and Vega-Embed as one script."""
    try:
        import vl_convert
    except ImportError as exc:
        raise ConfigError(NEEDED) from exc
    bundle: str = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;", VEGA_LITE)
    return bundle.replace("</script", "<\\/script")


@cache
def _asset(name: str) -> str:
    return (resources.files("engine.report") / "assets" / name).read_text(encoding="utf-8")


def style() -> str:
    """The style sheet, which the local view shares."""
    return _asset("report.css")


def policy() -> str:
    """What the page may do: run these two scripts, use this style, and nothing else."""

    def source(text: str) -> str:
        digest = hashlib.sha256(text.encode()).digest()
        return f"'sha256-{base64.b64encode(digest).decode()}'"

    scripts = f"{source(vega())} {source(_asset('report.js'))}"
    return (
        f"default-src 'none'; script-src {scripts}; style-src {source(style())};"
        " base-uri 'none'; form-action 'none'"
    )


def page(analysis: Mapping[str, Any], pictures: Mapping[str, Any]) -> str:
    """The page for an analysis and its pictures."""
    drawn = charts(dict(analysis), dict(pictures))
    figures = analysis["figures"]
    title = f"{counted(figures['accepted'], 'record')} by {visible(models(analysis))}"
    return document(title, "".join(_sections(analysis, pictures, drawn)), drawn)


def document(
    title: str, body: str, drawn: Mapping[str, Any], *, refresh_s: int | None = None
) -> str:
    """A whole page: a body of HTML with a place for each chart that is ``drawn``, by its id.

    Args:
        title: text.
        refresh_s: the page asks for itself again so often; None: it is as it is.
    """
    # "<" would end the script element; every other character is inert there.
    data = orjson.dumps(drawn).decode().replace("<", "\\u003c")
    refresh = f'<meta http-equiv="refresh" content="{refresh_s}">\n' if refresh_s else ""
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{escape(policy())}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
{refresh}<title>{escape(title)}</title>
<style>{style()}</style>
</head>
<body>
<main>
{body}
</main>
<script type="application/json" id="charts">{data}</script>
<script>{vega()}</script>
<script>{_asset("report.js")}</script>
</body>
</html>
"""


def _sections(
    analysis: Mapping[str, Any], pictures: Mapping[str, Any], drawn: Mapping[str, Any]
) -> Iterable[str]:
    figures, told_by = analysis["figures"], analysis["told_by"]
    records = counted(figures["accepted"], "record")
    yield f"<h1>{records} <small>{_shown(figures['run'])}</small></h1>"
    yield _tiles(analysis)
    stage = "".join(f"Stage {_shown(told['stage'])}. " for told in analysis["stages"][-1:])
    yield f"<p>{stage}{_requests(figures)}</p>\n"
    if stages := lines(analysis):
        note = "Figures above, but for a cost of all stages, and below are those of the last one."
        yield _section("Stages", _stages(stages), note)
    yield _section(
        "Rows at random",
        _accepted(analysis["accepted_examples"]),
        "Read these before anything else: no figure says whether the rows are good.",
    )
    yield _section("Over time", _row(drawn, "accepted-over-time", "tokens-over-time"))
    yield _section("Why pieces were refused", _row(drawn, "reasons") + _rejected(analysis))
    yield _section(
        "How close rows are to each other",
        _row(drawn, "rouge", "cosine"),
        "How much each row shares with the row most like it: in words (ROUGE-L, among the rows"
        " before it) and in meaning (cosine, among all others; a sample). Refused rows are beside"
        " the row that they repeat.",
    )
    where = pictures["map"]
    yield _section(
        f"A map of the {told_by}s",
        _row(drawn, "map"),
        f"{where['rows']:,} rows, placed by {_shown(where['by'])}. {_grouped(where['groups'])}"
        " Drag to move it, turn the wheel to come closer.",
    )
    said = pictures["verbs"]
    yield _section(
        "What is asked for",
        _row(drawn, "verbs") if said is not None else _openings(analysis["openings"]),
        f"The most frequent openings of the {told_by}s."
        if said is None
        else f"The {len(said['verbs'])} most frequent verbs (inside) and their most frequent"
        f" objects (outside), as {_shown(said['by'])} reads {said['parsed']:,} {told_by}s;"
        f" {said['with_object']:,} of them have both.",
    )
    lengths = [f"words-{name}" for name in analysis["words"]]
    share = analysis["share_with_input"]
    note = "" if share is None else f"{share:.0%} of the rows have an input."
    yield _section("Lengths", _row(drawn, *lengths), note)
    yield _section("Before you train on it", _checks(analysis))
    yield _section(
        "Suspicious bursts",
        _bursts(analysis),
        f"Phrases in at least 20 rows whose {_shown(analysis['answer'])}s begin alike, or whose"
        " words hardly occur without each other. A trigger that somebody planted looks like this,"
        " and so does a fixed expression: look at them.",
    )
    yield _section("Settings", _settings(analysis))


def _grouped(groups: Sequence[str]) -> str:
    if not groups:
        return "They do not fall into groups."
    return f"Colours are {len(groups)} groups (k-means), named by the words that tell them apart."


def _section(title: str, content: str, note: str = "") -> str:
    below = f"<p>{note}</p>" if note else ""
    return f"<section><h2>{title}</h2>{below}{content}</section>\n"


def _row(drawn: Mapping[str, Any], *names: str) -> str:
    places = "".join(
        f'<div class="chart" id="{escape(name)}" role="img"'
        f' aria-label="{escape(visible(name.replace("-", " ")))}"></div>'
        for name in names
        if name in drawn
    )
    return f'<div class="row">{places}</div>' if places else "<p>Nothing to draw.</p>"


def _tiles(analysis: Mapping[str, Any]) -> str:
    figures = analysis["figures"]
    pieces = figures["pieces"]
    tiles = [
        ("accepted", f"{figures['accepted']:,}"),
        ("of all pieces accepted", f"{figures['accepted'] / pieces:.1%}" if pieces else "none"),
        ("answers", f"{figures['responses']:,}"),
        ("failed permanently", f"{figures['failed']:,}"),
        ("tokens per accepted row", _number(figures["tokens_per_accepted"])),
        ("completion tokens/s", _number(figures["tokens_per_s"])),
    ]
    if figures["not_compared_by_meaning"]:
        unread = figures["not_compared_by_meaning"]
        tiles.append(("rows not compared by meaning", f"{unread:,}"))
    if left_out := figures["input_rows_left_out"]:
        tiles.append(("input rows left out, which cannot be read", f"{left_out:,}"))
    for name, cost in costs(analysis):
        if cost is not None:
            tiles.append((name, in_money(cost)))
    if analysis["latency_s"]:
        tiles.append(("seconds an answer, median", f"{analysis['latency_s']['p50']:,.2f}"))
    cells = "".join(f"<div><b>{value}</b><span>{name}</span></div>" for name, value in tiles)
    return f'<div class="tiles">{cells}</div>\n'


def _requests(figures: Mapping[str, Any]) -> str:
    """What became of each request that was sent, in a sentence."""
    became = {
        "failed": "failed permanently",
        "dropped_at_a_stop": "dropped at a stop, perhaps billed and not kept",
        "waiting_at_a_stop": "waiting to be asked again at a stop",
        "lost_in_a_crash": "lost in a crash",
        "in_flight": "in flight",
    }
    parts = [f"{figures['responses']:,} answered"]
    parts += [f"{figures[name]:,} {words}" for name, words in became.items() if figures[name]]
    wasted = figures["wasted"]
    why = "their requests had one already, or were asked anew"
    more = f" Another {counted(wasted, 'answer')} not used: {why}." if wasted else ""
    return f"Of {figures['requests']:,} requests sent: {', '.join(parts)}.{more}"


def table_of(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table with cells of HTML under names. On a narrow screen it becomes a list of cards, for
    which each cell knows the name of its column.
    """
    columns = "".join(f"<th>{_shown(name)}</th>" for name in head)
    body = "".join(
        "<tr>"
        + "".join(
            f'<td data-column="{escape(visible(name))}">{cell}</td>'
            for name, cell in zip(head, row, strict=True)
        )
        + "</tr>"
        for row in rows
    )
    cards = ' class="cards"' if len(head) > 2 else ""
    return f"<table{cards}><thead><tr>{columns}</tr></thead><tbody>{body}</tbody></table>"


def _stages(stages: Sequence[Sequence[Any]]) -> str:
    def cell(value: Any) -> str:
        number = isinstance(value, int | float)
        return f"{value:,}" if number else _shown("" if value is None else value)

    return table_of(COLUMNS, [[cell(value) for value in stage] for stage in stages])


def _accepted(examples: Sequence[Mapping[str, Any]]) -> str:
    """Rows with all their fields, the first of them open."""
    parts = []
    for place, row in enumerate(examples):
        first = telling_text(row["fields"]) or ""
        fields = "".join(
            f"<dt>{_shown(name)}</dt><dd>{_shown(text)}</dd>"
            for name, text in row["fields"].items()
            if text
        )
        parts.append(
            f"<details{' open' if not place else ''}><summary>{_shown(shorten(first, 100))} "
            f"<b>{escape(row['id'])}</b></summary><dl>{fields}</dl></details>"
        )
    return "".join(parts) or "<p>None yet.</p>"


def _number(value: float | None) -> str:
    return "unknown" if value is None else f"{value:,.0f}"


def _rejected(analysis: Mapping[str, Any]) -> str:
    parts = []
    told_by = analysis["told_by"]
    for reason, told in analysis["rejected"].items():
        table = table_of(
            ("piece", told_by, "why"),
            [
                (
                    escape(example["id"]),
                    _shown(example[told_by]),
                    _shown(example["detail"]) + _nearest(example["nearest"]),
                )
                for example in told["examples"]
            ],
        )
        parts.append(
            f"<details><summary>{_shown(reason)} <b>{told['count']:,}</b></summary>{table}"
            "</details>"
        )
    return "".join(parts)


def _nearest(nearest: Mapping[str, Any] | None) -> str:
    if nearest is None:
        return ""
    source = f"{_shown(nearest['source'])}, {nearest['score']:.3f}"
    return f"{_shown(nearest['text'])} <small>{source}</small>"


def _checks(analysis: Mapping[str, Any]) -> str:
    again = analysis["output_duplicates"]
    answer = analysis["answer"]
    rows = [(_shown(check), f"{count:,}") for check, count in analysis["checks"].items()]
    rows.append((f"{_shown(answer)} is that of an earlier row too", f"{again['rows']:,}"))
    table = table_of(("what to look for", "rows"), rows)
    if not again["most"]:
        return table
    most = table_of(
        ("rows", "one of them", answer),
        [(f"{d['rows']:,}", escape(d["id"]), _shown(d["output"])) for d in again["most"]],
    )
    return f"{table}<details><summary>the most repeated {_shown(answer)}s</summary>{most}</details>"


def _openings(openings: Sequence[tuple[str, int]]) -> str:
    return table_of(("opening", "rows"), [(_shown(text), f"{count:,}") for text, count in openings])


def _bursts(analysis: Mapping[str, Any]) -> str:
    if not analysis["bursts"]:
        return "<p>None found.</p>"
    return table_of(
        ("phrase", "rows", "sign", f"how the {analysis['answer']}s begin"),
        [
            (
                _shown(burst["phrase"]),
                f"{burst['rows']:,}",
                burst["sign"],
                f"{burst['agreement']:.0%}: {_shown(burst['opening'])}",
            )
            for burst in analysis["bursts"]
        ],
    )


def _settings(analysis: Mapping[str, Any]) -> str:
    parts = []
    for part, name in (
        ("fixed", "what was asked"),
        ("decision", "how it was decided"),
        ("free", "how it was run"),
    ):
        rows = [
            (_shown(key), _shown(orjson.dumps(value).decode()))
            for key, value in sorted(analysis["settings"][part].items())
        ]
        table = table_of(("setting", "value"), rows)
        parts.append(f"<details><summary>{name}</summary>{table}</details>")
    return "".join(parts)


def _shown(text: object) -> str:
    """Any text as HTML, with nothing in it that acts or hides."""
    return "" if text is None else f"<bdi>{escape(visible(str(text)))}</bdi>"
