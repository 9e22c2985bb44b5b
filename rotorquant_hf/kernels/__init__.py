"""Triton kernels. Each does in one launch what plain torch does in several."""
