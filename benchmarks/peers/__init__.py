"""One job, as each peer's own documentation does it; see ``benchmarks.bench_recipes``.

A peer is a program: ``python peer_X.py ROWS URL FOLDER IN_FLIGHT``. ``ROWS`` are JSON Lines with
``number`` and ``question``; it asks each question by chat, wants an object with ``answer`` and
``certainty``, and prints as its last line how many rows it has at its end, and how many it says
that it lost.
"""
