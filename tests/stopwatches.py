"""Stopwatches for the tests of benchmarks, which time nothing."""


class FakeStopwatch:
    """Does not run what it is given: every replay "takes" the same made-up time."""

    l2_bytes = 1

    def __init__(self, seconds=1e-3):
        self.duration = seconds

    def record(self, run):
        return run, "graph"

    def seconds(self, run):
        return self.duration

    def seconds_of_host(self, run):
        return self.seconds(run)


class SteppedStopwatch(FakeStopwatch):
    """Runs what it is given, and reads a clock that the calls themselves turn."""

    def __init__(self):
        self.now = 0.0

    def seconds(self, run):
        before = self.now
        run()
        return self.now - before
