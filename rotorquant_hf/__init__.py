"""KV-cache compression for Hugging Face Transformers with Clifford-rotor quantisation.

from rotorquant_hf import RotorQuantCache
model.generate(**inputs, past_key_values=RotorQuantCache())
"""

from rotorquant_hf.allocating import allocate_bits
from rotorquant_hf.attention.registered import register as _register_attention
from rotorquant_hf.cache import RotorQuantCache
from rotorquant_hf.calibrating import calibrate
from rotorquant_hf.calibration import Calibration
from rotorquant_hf.config import PRESETS, RotorQuantConfig
from rotorquant_hf.decoding import decode_with_graph
from rotorquant_hf.graph import DecodeGraph
from rotorquant_hf.memory import MemoryReport
from rotorquant_hf.quant import RotorQuantMSE, RotorQuantProd
from rotorquant_hf.store.kv_store import RotorQuantKVCache
from rotorquant_hf.version import __version__
from rotorquant_hf.warming import warm_up

__all__ = [
    "PRESETS",
    "Calibration",
    "DecodeGraph",
    "MemoryReport",
    "RotorQuantCache",
    "RotorQuantConfig",
    "RotorQuantKVCache",
    "RotorQuantMSE",
    "RotorQuantProd",
    "__version__",
    "allocate_bits",
    "calibrate",
    "decode_with_graph",
    "warm_up",
]

_register_attention()
