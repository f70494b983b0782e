"""What the data scripts do: examine, count, filter, and write shards."""
