"""Rows: read, decided, checked, priced."""
