"""Behind `index.py`: measuring a shard, sharing the work, the columns, their store, and what they are true of."""
