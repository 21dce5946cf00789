"""Generate a dataset from a manifest: one client of `aae_batch.job`."""
