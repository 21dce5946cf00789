"""The output of a run: names, schemas, writing, reading and verifying."""
