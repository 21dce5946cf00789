"""What a run writes: names, tables, storage."""
