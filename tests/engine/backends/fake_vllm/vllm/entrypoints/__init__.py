"""What vLLM starts from a command line."""
