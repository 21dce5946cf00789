"""Manifest -> dataset: one client of the job."""
