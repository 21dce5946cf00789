"""The networks behind the engine."""
