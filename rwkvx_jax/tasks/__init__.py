"""Generators of synthetic texts with known answers, shared by training data and evaluation."""
