"""Store to figures, and figures to what a person reads.

figures (counts) ─┐
analysis (rows) ──┼─▶ markdown, JSON
pictures (map, verbs) ─▶ charts (Vega-Lite) ─▶ html
"""

from engine.report.figures import figures

__all__ = ["figures"]
