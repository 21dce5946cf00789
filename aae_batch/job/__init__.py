"""Any job on Ray: hand pieces to workers, and supervise them until every piece is committed."""
