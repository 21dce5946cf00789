"""Where bytes live: a folder, S3, or any scheme of fsspec."""
