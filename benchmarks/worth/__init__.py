"""Parts of ``benchmarks/bench_worth.py``: Alpaca's own loop, and what rows are measured by."""
