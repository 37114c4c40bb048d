"""One run: ``generate`` puts its parts together, ``pipeline`` sends, keeps and stops."""
