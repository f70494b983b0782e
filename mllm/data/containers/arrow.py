"""Tables of Arrow and Parquet, and what `datasets` saves: records lie at a row number.

Enters: a file. Leaves: a `Container` over the mapped file: a fetch touches one row and nothing else. Parquet packs
thousands of rows into one compressed block and cannot be read at a row; it is laid out as Arrow in the cache once, as
`datasets` does with every Parquet file that it loads.
"""

from __future__ import annotations

import shutil
from bisect import bisect_right
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mllm.data.copies import cache_folder, made_of

if TYPE_CHECKING:
    import pyarrow as pa

BATCH = 256
"""Rows of a block in the Arrow files made here."""
AT_ONCE = 32
"""Rows that become Python objects at a time: they may hold images."""


class ArrowRows:
    """Rows of an Arrow file, of the kind with a footer or of the kind that `datasets` streams to disk."""

    def __init__(self, path: Path, told: Path) -> None:
        import pyarrow as pa

        try:
            mapped = pa.memory_map(str(path))
            if mapped.read(6) == b"ARROW1":
                table = pa.ipc.open_file(mapped)
                self.batches = [table.get_batch(i) for i in range(table.num_record_batches)]
            else:
                mapped.seek(0)
                self.batches = list(pa.ipc.open_stream(mapped))
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"{told} is no whole table ({error}): write or download it again") from error
        self.ends = list(accumulate(batch.num_rows for batch in self.batches))

    def scan(self) -> Iterator[tuple[int, int, Any]]:
        row = 0
        for batch in self.batches:
            for first in range(0, batch.num_rows, AT_ONCE):
                for record in batch.slice(first, AT_ONCE).to_pylist():
                    yield row, 0, record
                    row += 1

    def fetch(self, start: int, size: int) -> Any:
        number = bisect_right(self.ends, start)
        if number == len(self.batches):
            raise ValueError(f"the table has {self.ends[-1] if self.ends else 0} rows, fewer than when it was indexed")
        batch = self.batches[number]
        return batch.slice(start - self.ends[number] + batch.num_rows, 1).to_pylist()[0]


def arrow_of_parquet(path: Path) -> Path:
    """The Arrow file in the cache that holds the same rows."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    def lay_out(target: Path) -> None:
        with pq.ParquetFile(path) as file:
            groups = range(file.metadata.num_row_groups)
            needed = sum(file.metadata.row_group(i).total_byte_size for i in groups)
            free = shutil.disk_usage(target.parent).free
            if needed > free:
                raise ValueError(
                    f"{path} needs {needed / 2**30:.1f} GiB in the cache {cache_folder()}, which has "
                    f"{free / 2**30:.1f}: set MLLM_CACHE to a larger disk"
                )
            schema = without_dictionaries(file.schema_arrow)
            with pa.ipc.new_file(str(target), schema) as table:
                for batch in file.iter_batches(BATCH):
                    table.write_batch(batch if batch.schema == schema else batch.cast(schema))

    try:
        return made_of(path, f"{path.stem}.arrow", lay_out)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path} is no whole Parquet file ({error}): write or download it again") from error


def without_dictionaries(schema: pa.Schema) -> pa.Schema:
    """Categories as plain values: each block of a Parquet file may number them anew, which an Arrow file cannot."""
    import pyarrow as pa

    plain = [
        field.with_type(field.type.value_type) if pa.types.is_dictionary(field.type) else field for field in schema
    ]
    return pa.schema(plain, metadata=schema.metadata)
