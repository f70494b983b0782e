"""Shards: any source as WebDataset tars, which every reader of tars knows.

Enters: a source and `Settings`. Leaves: a folder of tars. `members` says how a record lies in a tar, `writer` writes
one shard after the other, `folder` remembers how they were asked for, so that a run that was stopped goes on.
"""
