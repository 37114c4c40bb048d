"""Prompts that fit: their parts are counted and give way where the context is short."""
