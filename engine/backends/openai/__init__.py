"""Hosts with an OpenAI-compatible API.

``backend`` makes one attempt. ``address`` reads its URL, ``dialect`` learns what it takes, ``wire``
is the connection, ``streaming`` says how to ask, ``reply`` and ``error_body`` read what comes back,
``verdicts`` judges faults.
"""
