"""Storage backends: a local folder, S3, or any fsspec scheme."""
