"""A manifest becomes a dataset, and its pictures are scored: plan, actors, supervision."""
