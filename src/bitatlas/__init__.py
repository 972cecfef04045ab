"""bitatlas: what low-bit weights do to a language model, measured, planned and verified."""

__version__ = "0.1.0"
