"""The server: the loop over rounds and the parts that it calls."""
