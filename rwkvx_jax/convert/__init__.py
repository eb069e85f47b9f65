"""Readers and writers of official checkpoints, without torch."""
