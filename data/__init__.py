"""What a record is, how shards are written, and in which order records come."""
