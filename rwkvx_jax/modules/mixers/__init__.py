"""Sequence mixers of the recurrent blocks, one file each; `ModelConfig.mixer` chooses."""

from rwkvx_jax.config.mixers import MixerName
from rwkvx_jax.modules.mixers.base import LinearMixer
from rwkvx_jax.modules.mixers.deltanet import GatedDeltaNet
from rwkvx_jax.modules.mixers.kda import KDA
from rwkvx_jax.modules.mixers.lightning import Lightning
from rwkvx_jax.modules.mixers.mamba2 import Mamba2
from rwkvx_jax.modules.mixers.rwkv4 import RWKV4
from rwkvx_jax.modules.mixers.rwkv5 import RWKV5
from rwkvx_jax.modules.mixers.rwkv6 import RWKV6
from rwkvx_jax.modules.mixers.rwkv7 import TimeMix

MIXERS: dict[MixerName, type[TimeMix] | type[RWKV4] | type[LinearMixer]] = {
    "rwkv7": TimeMix,
    "rwkv6": RWKV6,
    "rwkv5": RWKV5,
    "rwkv4": RWKV4,
    "gated_deltanet": GatedDeltaNet,
    "deltanet": GatedDeltaNet,
    "kda": KDA,
    "mamba2": Mamba2,
    "lightning": Lightning,
}
