"""Embeddings by a server elsewhere, behind the seam of ``engine.dedup.encoder``."""
