"""A job's rows on several processes or machines: workers on Ray Data; needs the `[ray]` extra.

Ray replaces a worker that dies, as often as it takes, and repeats its batch. The process that was started records the results
(`data/journal.py`), so that an interrupted job resumes.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
import ray.data
import ray.exceptions

from aligner_middleware.data.journal import Row
from aligner_middleware.data.upstream import brief
from aligner_middleware.errors import AlignerError, InputError

Work = Callable[[Sequence[Any]], Sequence[Row]]


@dataclass(frozen=True)
class RayWorkers:
    """Processes of Ray that turn items into rows.

    Attributes:
        prepare: Called once in each worker, whatever the machine: loads what the worker needs, and gives the function that
            turns a batch of items into as many rows or errors. Has to be picklable, such as a `functools.partial`.
        count: How many workers.
        batch: Items that one takes at once.
        address: Of a Ray cluster; `None` for the one that this process is part of, or a new one on this machine.
    """

    prepare: Callable[[], Work]
    count: int = 2
    batch: int = 16
    address: str | None = None

    def run(self, items: Mapping[str, Any]) -> Iterator[dict[str, Row]]:
        """Yield the rows of each finished batch by the keys of their items, in any order.

        Args:
            items: Values that JSON can hold, by key.

        Raises:
            InputError: If the workers cannot load what they need, or the cluster fails.
        """
        if not items:
            return
        self._connect()
        try:
            for table in self._dataset(items).iter_batches(batch_size=None, batch_format="pyarrow"):
                yield {row["key"]: _row(row) for row in table.to_pylist()}
        except ray.exceptions.RayError as exc:  # its text is the worker's traceback, the reason last
            raise InputError(f"the workers on Ray failed: {str(exc).strip().splitlines()[-1]}") from exc

    def _connect(self) -> None:
        if not ray.is_initialized():
            ray.init(address=self.address, include_dashboard=False, log_to_driver=False, configure_logging=False)
        ray.data.DataContext.get_current().enable_progress_bars = False
        logging.getLogger("ray.data").setLevel(logging.ERROR)  # it logs every plan, and that it draws no bars

    def _dataset(self, items: Mapping[str, Any]) -> Any:
        blocks = max(self.count, -(-len(items) // self.batch))
        rows = [{"key": key, "item": json.dumps(item)} for key, item in items.items()]
        return ray.data.from_items(rows, override_num_blocks=blocks).map_batches(
            _Worker,
            fn_constructor_args=(self.prepare,),
            batch_size=self.batch,
            compute=ray.data.ActorPoolStrategy(size=self.count),
            num_cpus=1,
        )


class _Worker:
    """A process of Ray."""

    def __init__(self, prepare: Callable[[], Work]) -> None:
        self._work = prepare()

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[str]]:
        rows = self._work([json.loads(str(item)) for item in batch["item"]])
        errors = [_text(row) if isinstance(row, Exception) else "" for row in rows]
        texts = ["" if isinstance(row, Exception) else json.dumps(row) for row in rows]
        return {"key": [str(key) for key in batch["key"]], "row": texts, "error": errors}


def _text(error: Exception) -> str:
    return str(error) if isinstance(error, AlignerError) else brief(error)


def _row(result: Mapping[str, str]) -> Row:
    return InputError(result["error"]) if result["error"] else json.loads(result["row"])
