"""Whether this installation is right on this machine: `python -m rwkvx_jax.doctor`."""
