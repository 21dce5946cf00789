"""Read, build, validate and price manifests."""
