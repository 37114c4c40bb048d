"""A read-only page on this machine: a run's rows, found, and each with where it comes from.

command ─▶ server (sockets, deadlines) ─▶ app (who may ask what) ─▶ rows (index, store)
"""
