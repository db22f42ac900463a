"""Federated NanoGPT on Flower: a thin app over gpt-core, shakespeare-data and flower-adapter."""
