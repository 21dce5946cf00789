"""A finished output as a dataset for others."""
