"""A manifest becomes a dataset: plan, actors, supervision."""
