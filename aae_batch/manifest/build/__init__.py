"""Build a manifest from prompts: read them, choose their subjects, and write their rows."""
