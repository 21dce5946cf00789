"""Guided sampling in batches: `Request` in, `Result` out."""
