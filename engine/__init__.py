"""Woolmill: a few seed tasks in, N accepted unique instruction records out."""
