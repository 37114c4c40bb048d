"""vLLM: ``backend`` runs it in a child process (``child``), ``servers`` as replicas over HTTP."""
