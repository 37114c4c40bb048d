"""Batches: requests handed over in a file, and answered within a day for about half the price.

    jobs        the seam: what a provider's batch API can do, in our words
    lines       the files, a line at a time
    client      small questions and large files over HTTP
    openai, together, mistral, anthropic, gemini, local     one provider each, or a few alike
    providers   which is which

``engine.run.bulk`` uses them.
"""
