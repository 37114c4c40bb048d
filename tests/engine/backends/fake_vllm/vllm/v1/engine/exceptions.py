"""What the engine raises."""


class EngineDeadError(Exception):
    """The engine's core has gone."""
