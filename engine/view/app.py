"""Who may ask what: every request passes ``_Guard``, and then meets one of six routes.

Other pages in the same browser are the ones to keep out: they can reach 127.0.0.1, under any name
that they make resolve to it. So the name asked for must be ours (DNS rebinding), a page of another
origin is refused, only GET and HEAD exist, and nothing is answered without the token: once in the
link that the command prints, then in a cookie that scripts cannot read. The answers allow no
script but the page's own and no origin but theirs. Nothing here changes anything.
"""

from __future__ import annotations

import hmac
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import anyio.to_thread
import orjson
from starlette.applications import Starlette
from starlette.datastructures import Headers, QueryParams
from starlette.requests import Request
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from engine.errors import InputError, WoolmillError
from engine.loop.ledger import Ledger
from engine.loop.page import html as rounds_html
from engine.report.html import html, policy
from engine.store import RunReader
from engine.view.metrics import metrics
from engine.view.rows import NEWEST, Rows

__all__ = ["Access", "make_app", "make_rounds_app"]

PER_SECOND = 50
"""Requests answered in one second; a page that shows and searches makes five."""
REPORT_FRESH_S = 60.0
ROUNDS_FRESH_S = 10

_ASSETS = {"view.js": "text/javascript", "view.css": "text/css"}
_HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self';"
    " connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Access:
    """What a request must know."""

    token: str
    hosts: frozenset[str]
    """``name:port`` as a browser sends it in Host."""
    cookie: str
    """Its name; it names the port, because cookies do not tell ports apart."""

    def admits(self, given: str | None) -> bool:
        return given is not None and hmac.compare_digest(given.encode(), self.token.encode())


def make_app(stages: Sequence[Rows], access: Access) -> ASGIApp:
    """The page, its data, the report and metrics, behind the guard.

    ``stages`` are those of the run in their order; what names none is answered for the last one.
    """
    views = _Stages(stages)
    routes = [
        Route("/", _page),
        Route("/enter", partial(_enter, access=access)),
        Route("/static/{name}", _static),
        Route("/api/state", partial(_json, ask=views.state)),
        Route("/api/rows", partial(_json, ask=views.found)),
        Route("/api/row/{request:int}/{position:int}", partial(_row, views=views)),
        Route("/report", partial(_report, views=views)),
        Route("/metrics", partial(_metrics, folder=stages[-1].folder)),
    ]
    handlers = {WoolmillError: _failed}
    return _Guard(Starlette(routes=routes, exception_handlers=handlers), access)  # type: ignore[arg-type]


def make_rounds_app(folder: Path, access: Access) -> ASGIApp:
    """The rounds of the loop in ``folder``, behind the same guard; a page that follows them."""

    async def page(request: Request) -> Response:
        made = partial(rounds_html, Ledger(folder), refresh_s=ROUNDS_FRESH_S)
        return _html(await anyio.to_thread.run_sync(made))

    routes = [Route("/", page), Route("/enter", partial(_enter, access=access))]
    handlers = {WoolmillError: _failed}
    return _Guard(Starlette(routes=routes, exception_handlers=handlers), access)  # type: ignore[arg-type]


class _Stages:
    """The stages of a run, each with its rows and its report."""

    def __init__(self, stages: Sequence[Rows]) -> None:
        self._rows = {rows.name: rows for rows in stages}
        self._reports = {rows.name: _Report(rows.folder) for rows in stages}
        self._last = stages[-1].name

    def _name(self, query: QueryParams) -> str:
        name = query.get("stage", "")
        return name if name in self._rows else self._last

    def rows(self, query: QueryParams) -> Rows:
        return self._rows[self._name(query)]

    def found(self, query: QueryParams) -> dict[str, Any]:
        """A page of the rows of one stage; with words, also how many each other stage has."""
        rows = self.rows(query)
        words, status = query.get("q", "")[:1000], query.get("status", "all")
        others = [each for each in self._rows.values() if words.strip() and each is not rows]
        counted = [(each.name, each.matches(words, status=status)) for each in others]
        before = query.get("before", "")
        return {
            **rows.find(
                words,
                status=status,
                reason=query.get("reason", "")[:100],
                before=int(before)
                if before.isascii() and before.isdigit() and len(before) < 16
                else NEWEST,
            ),
            "elsewhere": [[name, matches] for name, matches in counted if matches],
        }

    def report(self, query: QueryParams) -> _Report:
        return self._reports[self._name(query)]

    def state(self, query: QueryParams) -> dict[str, Any]:
        costs = [rows.cost() for rows in self._rows.values()]
        return {
            **self.rows(query).state(),
            "stages": list(self._rows),
            "cost_of_all_stages": None if None in costs else round(sum(filter(None, costs)), 6),
        }


class _Guard:
    """Refuses what must not be answered, and puts the protecting headers on every answer."""

    def __init__(self, app: ASGIApp, access: Access) -> None:
        self._app = app
        self._access = access
        self._second = 0
        self._in_second = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return  # a websocket is closed unanswered

        async def protected(message: Message) -> None:
            if message["type"] == "http.response.start":
                present = {name for name, _ in message["headers"]}
                message["headers"] = [
                    *message["headers"],
                    *(
                        (n.encode(), v.encode())
                        for n, v in _HEADERS.items()
                        if n.encode() not in present
                    ),
                ]
            await send(message)

        refusal = self._refusal(scope)
        await (refusal or self._app)(scope, receive, protected)

    def _refusal(self, scope: Scope) -> Response | None:
        headers = Headers(scope=scope)
        if headers.get("host") not in self._access.hosts:
            return PlainTextResponse("this name is not served here", 421)
        if scope["method"] not in ("GET", "HEAD"):
            return PlainTextResponse("read only", 405, {"allow": "GET, HEAD"})
        if headers.get("content-length", "0") != "0" or "transfer-encoding" in headers:
            return PlainTextResponse("no body is read here", 413)
        origin = headers.get("origin")
        own = {f"http://{host}" for host in self._access.hosts}
        if origin not in own and origin is not None:
            return PlainTextResponse("not from another page", 403)
        if headers.get("sec-fetch-site", "none") == "cross-site" and scope["path"] != "/":
            return PlainTextResponse("not from another page", 403)
        if scope["path"] != "/enter" and not self._is_known(scope, headers):
            return PlainTextResponse("open the link that woolmill view printed", 401)
        second = int(time.monotonic())
        if second != self._second:
            self._second, self._in_second = second, 0
        self._in_second += 1
        if self._in_second > PER_SECOND:
            return PlainTextResponse("too many requests", 429, {"retry-after": "1"})
        return None

    def _is_known(self, scope: Scope, headers: Headers) -> bool:
        bearer = headers.get("authorization", "").removeprefix("Bearer ")
        cookie = Request(scope).cookies.get(self._access.cookie)
        return self._access.admits(cookie) or self._access.admits(bearer)


async def _enter(request: Request, *, access: Access) -> Response:
    """Exchange the link's token for a cookie, and lead to an address without it, which shows what
    the link names.
    """
    if not access.admits(request.query_params.get("token")):
        return PlainTextResponse("open the link that woolmill view printed", 401)
    told = request.query_params
    shown = {name: told[name] for name in ("stage", "q", "status", "reason") if name in told}
    response = RedirectResponse(f"/?{urlencode(shown)}" if shown else "/", 303)
    response.set_cookie(access.cookie, access.token, httponly=True, samesite="strict", path="/")
    return response


async def _page(request: Request) -> Response:
    return Response(_read("view.html"), media_type="text/html")


async def _static(request: Request) -> Response:
    name = request.path_params["name"]
    if name not in _ASSETS:
        return PlainTextResponse("not here", 404)
    return Response(_read(name), media_type=_ASSETS[name])


def _read(name: str) -> bytes:
    return (resources.files("engine.view") / "static" / name).read_bytes()


Ask = Callable[[QueryParams], Any]


async def _json(request: Request, *, ask: Ask) -> Response:
    told = await anyio.to_thread.run_sync(ask, request.query_params)
    return _told(told)


def _told(value: Any) -> Response:
    try:
        body = orjson.dumps(value)
    except TypeError:  # a lone surrogate in a model's text
        body = orjson.dumps(_without_surrogates(value))
    return Response(body, media_type="application/json")


def _without_surrogates(value: Any) -> Any:
    if isinstance(value, str):
        return value.encode(errors="replace").decode()
    if isinstance(value, list):
        return [_without_surrogates(item) for item in value]
    if isinstance(value, dict):
        return {key: _without_surrogates(item) for key, item in value.items()}
    return value


async def _row(request: Request, *, views: _Stages) -> Response:
    place = request.path_params["request"], request.path_params["position"]
    if max(place) >= 2**62:
        raise InputError(f"no row {place[0]}.{place[1]}")
    rows = views.rows(request.query_params)
    return _told(await anyio.to_thread.run_sync(rows.row, *place))


async def _failed(request: Request, exc: WoolmillError) -> Response:
    missing = isinstance(exc, InputError) and str(exc).startswith("no row")
    return PlainTextResponse(str(exc), 404 if missing else 500)


class _Report:
    """The report, made in one thread at a time and kept for a minute."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lock = threading.Lock()
        self._made_at = -REPORT_FRESH_S
        self._text = ""
        self._error: WoolmillError | None = None

    def get(self) -> str | None:
        """The page; None while it is being made. Raises what making it raised."""
        if time.monotonic() - self._made_at < REPORT_FRESH_S:
            if self._error is not None:
                raise self._error
            return self._text
        if self._lock.acquire(blocking=False):
            threading.Thread(target=self._make, name="woolmill-report", daemon=True).start()
        return None

    def _make(self) -> None:
        try:
            with RunReader(self._folder) as run:
                self._text, self._error = html(run), None
        except WoolmillError as exc:
            self._error = exc
        finally:
            self._made_at = time.monotonic()
            self._lock.release()


WAITING = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>Woolmill</title>
<p>The report is being made; this page follows.</p>
"""


async def _report(request: Request, *, views: _Stages) -> Response:
    text = views.report(request.query_params).get()
    if text is None:
        return _html(WAITING, refresh="1")
    return _html(text)


def _html(text: str, **headers: str) -> Response:
    """A page of a report, which may run its own script and no other."""
    headers["content-security-policy"] = f"{policy()}; frame-ancestors 'none'"
    return Response(text, media_type="text/html", headers=headers)


async def _metrics(request: Request, *, folder: Path) -> Response:
    def read() -> str:
        with RunReader(folder) as run:
            return metrics(run)

    text = await anyio.to_thread.run_sync(read)
    return PlainTextResponse(text, headers={"content-type": "text/plain; version=0.0.4"})
