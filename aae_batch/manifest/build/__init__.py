"""From prompts to a manifest: where they come from, what in them must be drawn, which rows they make."""
