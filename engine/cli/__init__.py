"""The command line: ``main`` and the commands about this machine."""
