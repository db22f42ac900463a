"""The client: its ClientApp, its state between rounds, and the mods around it."""
