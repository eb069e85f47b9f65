"""Compile-only planning for accelerators that are not here."""
