"""Federated NanoGPT on Flower: a thin app over gpt-core, shakespeare-data and flower-adapter."""

# Not read from an installed distribution: Flower also runs the app from an unpacked archive.
__version__ = "0.2.0"
