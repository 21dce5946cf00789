"""Request -> Result: guided sampling in batches."""
