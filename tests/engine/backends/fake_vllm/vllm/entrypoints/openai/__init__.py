"""With OpenAI's API."""
