"""lm-eval with a compressed cache: `rotorquant lm-eval run --model rotorquant ...`.

Importing this package does not import lm-eval; `model` does, and registers `rotorquant` with it.
"""
