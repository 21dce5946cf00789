"""Dataset -> scores -> table: the other client of the job."""
