"""Where prompts are answered: see base.Backend."""
