"""Federated NanoGPT on Flower: a thin app over gpt-core, shakespeare-data and flower-adapter."""

# Flower also runs the app from an unpacked archive, which has no installed version to read.
__version__ = "0.5.0"
