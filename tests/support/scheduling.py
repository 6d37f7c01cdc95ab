"""Distributes the tests among two kinds of xdist's workers: exact ones, and quick ones.

XLA reads its flags once in a process. Exact workers run the tests of `compile_flags.EXACT`, with
XLA's own flags; quick workers run all others, with `compile_flags.QUICK`. `-n` is the number of
workers of each kind. Within a kind, tests are distributed as `--dist worksteal` does.
"""

import os
from collections.abc import Sequence

import pytest
from xdist.remote import Producer
from xdist.scheduler.worksteal import WorkStealingScheduling
from xdist.workermanage import WorkerController, parse_tx_spec_config

from tests.support.compile_flags import EXACT, QUICK

_QUICK_WORKER = "popen//env:XLA_FLAGS=" + " ".join([os.environ.get("XLA_FLAGS", ""), *QUICK])


def worker_specs(count: int) -> list[str]:
    """The workers that xdist starts for `-n count`."""
    return [_QUICK_WORKER] * count + ["popen"] * count


def is_exact_test(node_id: str) -> bool:
    """Whether a test needs XLA's own flags."""
    return node_id.startswith(EXACT)


def _is_exact_worker(spec: object) -> bool:
    return str(spec).endswith("popen")


class _OneKind(WorkStealingScheduling):
    """The tests of one kind, on the workers of that kind."""

    def __init__(self, config: pytest.Config, log: Producer, exact: bool):
        super().__init__(config, log)
        self.exact = exact
        self.numnodes = sum(_is_exact_worker(x) == exact for x in parse_tx_spec_config(config))

    def schedule(self) -> None:
        """Begins; called again, when there is a new worker, it gives that one its share."""
        if self.collection is None:
            if not self._check_nodes_have_same_collection():
                return
            self.collection = next(iter(self.node2collection.values()))
            self.pending[:] = [
                index
                for index, node_id in enumerate(self.collection)
                if is_exact_test(node_id) == self.exact
            ]
        self.check_schedule()


class ExactAndQuick:
    """Both kinds, as the one scheduler that xdist asks (xdist@3.8.0:scheduler/protocol.py)."""

    def __init__(self, config: pytest.Config, log: Producer):
        self._kinds = {exact: _OneKind(config, log, exact) for exact in (False, True)}

    def _of(self, node: WorkerController) -> _OneKind:
        return self._kinds[_is_exact_worker(node.gateway.spec)]

    @property
    def nodes(self) -> list[WorkerController]:
        return [node for kind in self._kinds.values() for node in kind.nodes]

    @property
    def collection_is_completed(self) -> bool:
        return all(kind.collection_is_completed for kind in self._kinds.values())

    @property
    def tests_finished(self) -> bool:
        return all(kind.tests_finished for kind in self._kinds.values())

    @property
    def has_pending(self) -> bool:
        return any(kind.has_pending for kind in self._kinds.values())

    def add_node(self, node: WorkerController) -> None:
        self._of(node).add_node(node)

    def add_node_collection(self, node: WorkerController, collection: Sequence[str]) -> None:
        self._of(node).add_node_collection(node, collection)

    def mark_test_complete(
        self, node: WorkerController, item_index: int, duration: float | None = None
    ) -> None:
        self._of(node).mark_test_complete(node, item_index, duration)

    def mark_test_pending(self, item: str) -> None:
        self._kinds[is_exact_test(item)].mark_test_pending(item)

    def remove_pending_tests_from_node(
        self, node: WorkerController, indices: Sequence[int]
    ) -> None:
        self._of(node).remove_pending_tests_from_node(node, indices)

    def remove_node(self, node: WorkerController) -> str | None:
        return self._of(node).remove_node(node)

    def schedule(self) -> None:
        for kind in self._kinds.values():
            kind.schedule()
