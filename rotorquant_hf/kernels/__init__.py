"""Triton kernels. Each does in one launch what plain torch beside it does in several."""
