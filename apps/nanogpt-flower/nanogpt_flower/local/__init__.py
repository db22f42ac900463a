"""Run the app in a Flower federation on this machine, and show its progress."""
