"""Token sources, the on-disk token cache and the random-access input pipeline."""
