"""Answers to decisions in plan order: ``decider`` is pure, ``process`` runs it in a child."""
