"""The networks that the engine runs."""
