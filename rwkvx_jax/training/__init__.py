"""The two-stage curriculum: losses, optimizer, train step and loop."""
