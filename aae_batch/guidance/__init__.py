"""Generative semantic nursing: what to ask of the attention maps, and when."""
