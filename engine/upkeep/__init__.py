"""Looking after runs that exist: ``verify``, ``salvage``, ``redecide``, ``merge``."""
