"""barrier.cluster: the one barrier of all threads of a cluster, which arrive at it and wait for it apart."""

from __future__ import annotations

import numpy as np

from .faults import Fault

AWAY, ARRIVED, OPEN = range(3)  # of a thread: not there; arrived in the phase that runs; in one that is complete


class ClusterBarriers:
    """Of the :class:`.machine.Machine` that it is given, one of each cluster.

    Attributes:
        waiting: lanes that are held until their cluster's phase is complete.
    """

    def __init__(self, machine) -> None:
        self.machine = machine
        self.state = np.zeros(machine.lanes, np.int8)
        self.waiting = np.zeros(machine.lanes, np.bool_)
        self.clusters = machine.ctas // machine.cluster
        # What those knew who arrived (seen, fenced): in the phase that runs, and in the one before it.
        self.arriving, self.complete = np.zeros((2, self.clusters, 2, machine.clocks.agents), np.int32)

    def _of_cluster(self, cluster):
        size = self.machine.lanes // self.clusters
        return slice(cluster * size, (cluster + 1) * size)

    def _clusters_of(self, lanes):
        """(cluster, those of the lanes that are its)."""
        of_lane = lanes // (self.machine.lanes // self.clusters)
        for cluster in np.unique(of_lane).tolist():
            yield cluster, lanes[of_lane == cluster]

    def arrive(self, mask: np.ndarray | None, relaxed: bool) -> None:
        """``relaxed``: who waits learns only what was known at a fence before."""
        m = self.machine
        lanes = m.chosen(mask)
        if (self.state[lanes] != AWAY).any():
            raise Fault("a thread arrives twice at the barrier of its cluster")
        tables = m.clocks.published if relaxed else (m.clocks.seen, m.clocks.fenced)
        for cluster, here in self._clusters_of(lanes):
            rows = np.unique(m.row_of_lane[here])
            knew = np.stack([table[rows].max(0) for table in tables])
            self.arriving[cluster] = np.maximum(self.arriving[cluster], knew)
            m.clocks.advance(rows)
            self.state[here] = ARRIVED
            self._settle(cluster)

    def wait(self, mask: np.ndarray | None) -> None:
        """The lanes in ``mask`` go on once all threads of their clusters have arrived or ended."""
        m = self.machine
        lanes = m.chosen(mask)
        if (self.state[lanes] == AWAY).any():
            raise Fault("a thread waits for the barrier of its cluster and has not arrived there")
        for cluster, here in self._clusters_of(lanes):
            self._pass(cluster, here[self.state[here] == OPEN])
            late = here[self.state[here] == ARRIVED]
            self.waiting[late] = m.thread_barriers.held[late] = True
        m.thread_barriers.holds_any = bool(m.thread_barriers.held.any())

    def _pass(self, cluster, lanes):
        self.machine.clocks.learn(np.unique(self.machine.row_of_lane[lanes]), *self.complete[cluster])
        self.state[lanes] = AWAY

    def _settle(self, cluster):
        """Ends the phase if all living threads have arrived; whether it did."""
        m, lanes = self.machine, self._of_cluster(cluster)
        arrived = self.state[lanes] == ARRIVED
        if not arrived.any() or not (arrived if m.alive is None else arrived | ~m.alive[lanes]).all():
            return False
        self.complete[cluster], self.arriving[cluster] = self.arriving[cluster], 0
        self.state[lanes][arrived] = OPEN
        waiting = m.every_lane[lanes][self.waiting[lanes]]
        self._pass(cluster, waiting)
        self.waiting[waiting] = m.thread_barriers.held[waiting] = False
        m.thread_barriers.holds_any = bool(m.thread_barriers.held.any())
        return True

    def release_for_the_living(self) -> bool:
        """Barriers that wait for threads that have ended since; whether any opened."""
        return any([self._settle(cluster) for cluster in range(self.clusters)])
