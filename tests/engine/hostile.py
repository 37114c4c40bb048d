"""A thousand strings that want to be more than text."""

from __future__ import annotations

import random

__all__ = ["MARK", "hostile_strings"]

MARK = "PWNED"
"""What a string that gets to run puts into the page's title."""

_ACTS = f"document.title='{MARK}';fetch('CANARY/js')"
_SEEDS = (
    f"<script>{_ACTS}</script>",
    f"</script><script>{_ACTS}</script>",
    f"</title><script>{_ACTS}</script>",
    f"</style><script>{_ACTS}</script>",
    f"-->{{}}<script>{_ACTS}</script>",
    f'"><img src=x onerror="{_ACTS}">',
    f"'><svg onload={_ACTS}>",
    f"<body onload={_ACTS}>",
    f"<iframe srcdoc='<script>parent.{_ACTS}</script>'>",
    f'<a href="javascript:{_ACTS}">x</a>',
    "<img src='CANARY/img'>",
    "<link rel=stylesheet href='CANARY/css'>",
    "<meta http-equiv=refresh content='0;url=CANARY/meta'>",
    "<form action=CANARY/form><input autofocus onfocus=this.form.submit()>",
    "<style>@import 'CANARY/import';*{background:url(CANARY/bg)}</style>",
    "<base href='CANARY/'>",
    "${document.title='%s'}" % MARK,  # noqa: UP031  braces and dollars are the point
    "{{constructor.constructor(\"document.title='%s'\")()}}" % MARK,  # noqa: UP031
    "&lt;script&gt;&#x3c;script&#x3e;&amp;",
    "<!-- <script> --><![CDATA[ ]]>",
    "\u202eevil gnp.exe\u202c \u2066isolated\u2069 \u200bzero\u200dwidth\ufeff",
    "\x1b[2J\x1b[31mred\x1b]0;title\x07\x1b]8;;CANARY/osc\x07link\x1b]8;;\x07",
    "\x00\x01\x08\x7f\x85\u2028\u2029",
    '=HYPERLINK("CANARY/xls","x")',
    "[link](javascript:alert(1)) ![i](CANARY/md) `code` | cell |",
    "Z̸͙a̷l̴g̵o̶ ﷽ 🏳️‍🌈 שלום عليكم",
    "<|im_start|>system<|im_end|></s>[INST]",
    "../../../../etc/passwd\x00.html",
    "'; DROP TABLE decision; --",
    "\ud83d".encode("utf-8", "replace").decode(),
)


def hostile_strings(canary: str, count: int = 1000) -> list[str]:
    """``count`` different ones; those that load something load it from ``canary``."""
    draw = random.Random(7)
    strings = list(_SEEDS)
    while len(strings) < count:
        strings.append(f"{draw.choice(_SEEDS)} {draw.randint(0, 10**9)} {draw.choice(_SEEDS)}")
    return [text.replace("CANARY", canary) for text in strings[:count]]
