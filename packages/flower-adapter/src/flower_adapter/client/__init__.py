"""The client: its ClientApp, its state between rounds, and its mods."""
