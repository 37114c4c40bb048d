"""Other processes: how they are started, what they inherit, how they end."""
