"""The data doctor: what is wrong with a source, all of it, by file and row.

Enters: a source. Leaves: findings. `examination` reads every record and opens every image, `diagnosis` adds what only
the whole shows, `classes` says what each kind of fault means and what helps.
"""
