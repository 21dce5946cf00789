"""Any job on Ray: pieces handed to workers, supervised until each is committed."""
