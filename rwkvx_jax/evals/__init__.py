"""The evaluation suite behind eval.py."""
