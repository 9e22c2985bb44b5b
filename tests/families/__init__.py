"""Every causal language model of the installed Transformers, tiny, and what the cache does with it.

    python -m tests.families

writes `evals/results/families.md`; `test_families.py` compares it with what it measures.
"""
