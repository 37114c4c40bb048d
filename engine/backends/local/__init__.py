"""A model in this process: ``backend`` on transformers, with continuous ``batching``."""
