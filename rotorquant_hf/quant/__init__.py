"""Quantisers of vectors: algebra, codebooks, rotations, packing. Knows nothing of models."""

from rotorquant_hf.quant.lloyd_max import LloydMaxCodebook
from rotorquant_hf.quant.mse import SCALES, MSECodes, RotorQuantMSE
from rotorquant_hf.quant.prod import PROJECTIONS, ProdCodes, RotorQuantProd
from rotorquant_hf.quant.quantizer import Quantizer
from rotorquant_hf.quant.rotations import ROTATIONS, Rotation, make_rotation

__all__ = [
    "PROJECTIONS",
    "ROTATIONS",
    "SCALES",
    "LloydMaxCodebook",
    "MSECodes",
    "ProdCodes",
    "Quantizer",
    "Rotation",
    "RotorQuantMSE",
    "RotorQuantProd",
    "make_rotation",
]
