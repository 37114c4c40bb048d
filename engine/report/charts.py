"""Analysis to Vega-Lite charts: plain JSON, drawn by Vega in the reader's browser.

Colours that follow light and dark are given to the page's script as names (``"accepted"``,
``"refused"``), which it replaces; see ``assets/report.js``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

__all__ = ["Chart", "charts", "curve"]

Chart = dict[str, Any]
HEIGHT = 200


def charts(analysis: dict[str, Any], pictures: dict[str, Any]) -> dict[str, Chart]:
    """Each chart by the id of its place in the page; those without data are left out."""
    drawn = {
        "accepted-over-time": _over_time(analysis, "accepted", "accepted records"),
        "tokens-over-time": _over_time(analysis, "tokens_per_s", "completion tokens/s"),
        "reasons": _reasons(analysis),
        "rouge": _scores(analysis["rouge_l"], "ROUGE-L F to the nearest earlier instruction"),
        "map": _map(pictures["map"], analysis["told_by"]),
        "verbs": _verbs(pictures["verbs"]) if pictures["verbs"] else None,
    }
    for name, words in analysis["words"].items():
        drawn[f"words-{name}"] = _lengths(words, f"{analysis['unit']} in the {name}")
    if analysis["cosine"]:
        drawn["cosine"] = _scores(analysis["cosine"], "cosine to the nearest other row")
    return {name: chart for name, chart in drawn.items() if chart is not None}


def _chart(values: list[Any], height: int = HEIGHT, **parts: Any) -> Chart:
    return {
        "$schema": "https://vega.github.io/schema/vega-lite/v6.json",
        "width": "container",
        "height": height,
        "data": {"values": values},
        **parts,
    }


def curve(points: Sequence[tuple[int, float, str]], along: str, title: str) -> Chart:
    """A line through (place, value, what became of it), each kind of point in a colour."""
    values = [{along: place, "y": value, "became": became} for place, value, became in points]
    at = _quantity(along, along, axis={"tickMinStep": 1, "format": "d"})
    value = _quantity("y", title, scale={"zero": False})
    kinds = {"domain": ["kept", "not kept"], "range": ["accepted", "refused"]}
    colour = {"field": "became", "title": None, "scale": kinds, "legend": {"orient": "top"}}
    tooltip = [at, _quantity("y", title), {"field": "became", "title": "became"}]
    return _chart(
        values,
        encoding={"x": at, "y": value},
        layer=[
            {"mark": {"type": "line", "color": "accepted", "opacity": 0.5}},
            {
                "mark": {"type": "point", "filled": True, "size": 80},
                "encoding": {"color": colour, "tooltip": tooltip},
            },
        ],
    )


def _quantity(field: str, title: str | None, **more: Any) -> dict[str, Any]:
    return {"field": field, "type": "quantitative", "title": title, **more}


def _over_time(analysis: dict[str, Any], field: str, title: str) -> Chart | None:
    bins = analysis["over_time"]
    if not bins:
        return None
    span = bins[-1]["at_s"]
    unit, seconds = next(
        (u for u in (("hours", 3600.0), ("minutes", 60.0)) if span > 3 * u[1]), ("seconds", 1.0)
    )
    values = [{"at": round(b["at_s"] / seconds, 3), "y": b[field]} for b in bins]
    at = _quantity("at", f"{unit} since the first answer")
    return _chart(
        values,
        mark={"type": "area", "line": {"color": "accepted"}, "color": "accepted", "opacity": 0.2},
        encoding={
            "x": at,
            "y": _quantity("y", title),
            "tooltip": [at, _quantity("y", title, format=",")],
        },
    )


def _reasons(analysis: dict[str, Any]) -> Chart | None:
    values = [
        {"reason": reason, "pieces": told["count"]} for reason, told in analysis["rejected"].items()
    ]
    if not values:
        return None
    return _chart(
        values,
        height=24 * len(values),
        mark={"type": "bar", "color": "refused", "cornerRadiusEnd": 3, "height": {"band": 0.7}},
        encoding={
            "y": {"field": "reason", "type": "nominal", "sort": "-x", "title": None},
            "x": _quantity("pieces", "pieces"),
            "tooltip": [{"field": "reason"}, _quantity("pieces", "pieces", format=",")],
        },
    )


def _lengths(words: dict[str, Any], title: str) -> Chart | None:
    if not words["bins"]:
        return None
    return _chart(
        words["bins"],
        mark={"type": "bar", "color": "accepted", "binSpacing": 1},
        encoding={
            "x": {"field": "from", "type": "quantitative", "bin": "binned", "title": title},
            "x2": {"field": "to"},
            "y": _quantity("rows", "rows"),
            "tooltip": [
                _quantity("from", "words from"),
                _quantity("to", "to below"),
                _quantity("rows", "rows", format=","),
            ],
        },
    )


def _scores(scores: dict[str, Any], title: str) -> Chart | None:
    """Accepted and refused side by side, with the threshold between them."""
    values = [
        {"from": i / len(bins), "to": (i + 1) / len(bins), "rows": n, "became": became}
        for became in ("accepted", "refused")
        for bins in (scores[became],)
        for i, n in enumerate(bins)
        if n
    ]
    if not values:
        return None
    bars = {
        "mark": {"type": "bar", "binSpacing": 1, "tooltip": True},
        "encoding": {
            "x": {
                "field": "from",
                "type": "quantitative",
                "bin": "binned",
                "title": title,
                "scale": {"domain": [0, 1]},
            },
            "x2": {"field": "to"},
            "y": _quantity("rows", "rows"),
            "color": {
                "field": "became",
                "title": None,
                "scale": {"domain": ["accepted", "refused"], "range": ["accepted", "refused"]},
                "legend": {"orient": "top"},
            },
            "tooltip": [
                {"field": "became", "title": "became"},
                _quantity("from", "from", format=".2f"),
                _quantity("to", "to below", format=".2f"),
                _quantity("rows", "rows", format=","),
            ],
        },
    }
    layers = [bars]
    if scores["threshold"] is not None:
        at = {"datum": scores["threshold"], "type": "quantitative"}
        once: Chart = {"data": {"values": [{}]}, "encoding": {"x": at}}
        layers.append({"mark": {"type": "rule", "strokeDash": [4, 3]}, **once})
        text = {"type": "text", "align": "right", "dx": -5, "y": 8, "text": "threshold"}
        layers.append({"mark": text, **once})
    return _chart(values, layer=layers)


def _map(rows: dict[str, Any], told_by: str) -> Chart | None:
    if not rows["points"]:
        return None
    names = [f"{i + 1}  {name}" for i, name in enumerate(rows["groups"])] or ["all rows"]
    values = [
        {"x": x, "y": y, "group": names[group], told_by: text, "row": row}
        for x, y, group, text, row in rows["points"]
    ]
    params: list[Any] = [{"name": "view", "select": "interval", "bind": "scales"}]
    opacity: dict[str, Any] = {"value": 0.75}
    if len(names) > 1:
        chosen = {"type": "point", "fields": ["group"]}
        params.insert(0, {"name": "chosen", "select": chosen, "bind": "legend"})
        opacity = {"condition": {"param": "chosen", **opacity}, "value": 0.05}
    legend = {"symbolOpacity": 1, "labelLimit": 260, "columns": 1}
    # A margin, so that no point lies on the edge.
    hidden = {"axis": None, "scale": {"zero": False, "nice": False, "padding": 24}}
    return _chart(
        values,
        height=460,
        params=params,
        mark={"type": "circle", "size": 22},
        encoding={
            "x": {"field": "x", "type": "quantitative", **hidden},
            "y": {"field": "y", "type": "quantitative", **hidden},
            "color": {
                "field": "group",
                "title": "groups (click one)",
                "scale": {"domain": names, "range": "groups"},
                "legend": legend if len(names) > 1 else None,
            },
            "opacity": opacity,
            "tooltip": [{"field": told_by}, {"field": "row"}, {"field": "group"}],
        },
    )


def _verbs(found: dict[str, Any]) -> Chart | None:
    """Verbs on an inner ring, their objects on an outer one, as wide as they are frequent."""
    total = sum(verb["rows"] for verb in found["verbs"])
    if not total:
        return None
    arcs: list[dict[str, Any]] = []
    begin = 0.0
    for verb in found["verbs"]:
        width = 2 * math.pi * verb["rows"] / total
        arcs.append(_arc(verb["verb"], verb["verb"], verb["rows"], begin, width, 60, 140))
        place = begin
        for thing, n in verb["objects"]:
            share = 2 * math.pi * n / total
            what = f"{verb['verb']} {thing}"
            arcs.append(_arc(thing, what, n, place, share, 142, 222) | {"verb": verb["verb"]})
            place += share
        begin += width
    fixed: dict[str, Any] = {"type": "quantitative", "scale": None}
    return {
        **_chart(arcs, height=470),
        "width": 470,
        "usermeta": {"radial": True},  # the page shrinks it where there is less room
        "encoding": {
            "theta": {"field": "begin", **fixed},
            "theta2": {"field": "end"},
            "radius": {"field": "inner", **fixed},
            "radius2": {"field": "outer"},
            "tooltip": [{"field": "what", "title": "says"}, _quantity("rows", "rows")],
        },
        "layer": [
            {
                "mark": {"type": "arc", "stroke": "surface", "strokeWidth": 1},
                "encoding": {
                    "color": {
                        "field": "verb",
                        "legend": None,
                        "scale": {
                            "domain": [verb["verb"] for verb in found["verbs"]],
                            "range": "groups",
                        },
                    },
                    "opacity": {"field": "opacity", **fixed},
                },
            },
            {
                "transform": [{"filter": "datum.end - datum.begin > 0.045"}],
                "mark": {"type": "text", "fontSize": 11, "baseline": "middle", "limit": 74},
                "encoding": {
                    "theta": {"field": "middle", **fixed},
                    "theta2": None,
                    "radius": {"field": "centre", **fixed},
                    "radius2": None,
                    "text": {"field": "name"},
                    "angle": {"field": "angle", **fixed},
                },
            },
        ],
        "config": {"view": {"stroke": None}},
    }


def _arc(
    name: str, what: str, rows: int, begin: float, width: float, inner: int, outer: int
) -> dict[str, Any]:
    middle = begin + width / 2
    degrees = math.degrees(middle)
    return {
        "name": name,
        "verb": name,
        "what": what,
        "rows": rows,
        "begin": round(begin, 5),
        "end": round(begin + width, 5),
        "middle": round(middle, 5),
        "inner": inner,
        "outer": outer,
        "centre": (inner + outer) / 2,
        # Along the radius, and never upside down.
        "angle": round(degrees - 90 if degrees < 180 else degrees + 90, 2),
        "opacity": 0.85 if inner < 100 else 0.45,
    }
