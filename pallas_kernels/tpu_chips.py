"""Which TPU a program is compiled for: kernels choose their tiles by it."""

import jax

_DEVICE_KINDS = {"TPU v5 lite": "v5e", "TPU v5": "v5p", "TPU v5p": "v5p", "TPU v6 lite": "v6e"}


def current_chip() -> str | None:
    """ "v5e", "v5p" or "v6e" by the mesh in force, else the default backend; None: another."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    kind = jax.devices()[0].device_kind if device is None else device.device_kind
    return _DEVICE_KINDS.get(kind)
