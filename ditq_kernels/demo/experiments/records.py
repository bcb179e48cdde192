"""Records of an experiment in a JSON file, which is whole at every moment and is taken up again where it stopped."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

from ...files import written_whole

VERSION = 1


@dataclass
class Records:
    """What one experiment found.

    Attributes:
        path: the file.
        about: protocol, versions and date.
        rows: one a variant, in the order they were measured: facts and findings together.
        complete: whether every variant is there.
    """

    path: Path
    about: dict[str, Any] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    complete: bool = False

    @classmethod
    def load(cls, path: Path) -> Records:
        """What ``path`` holds.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if it is no experiment's.
        """
        try:
            record = json.loads(path.read_text())
            return cls(path, record["about"], record["rows"], record["complete"])
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{path} does not hold an experiment's records: {error}") from None

    def begin(self, protocol: dict[str, Any], quantized_weights: int, fingerprint: str) -> None:
        """Go on with the file where it was left, or start it anew where it is complete, missing, or of another
        protocol, model or rule for zero points. ``quantized_weights``: how many the quantized layers hold.
        ``fingerprint``: the model's.
        """
        import diffusers
        import torch

        from ... import __version__
        from ...layer.grid import DEFAULT_ZERO_POINT

        self.about = dict(
            protocol=protocol,
            quantized_weights=quantized_weights,
            fingerprint=fingerprint,
            zero_point=DEFAULT_ZERO_POINT,
            torch=torch.__version__,
            diffusers=diffusers.__version__,
            ditq_kernels=__version__,
            machine=f"{platform.machine()}, {torch.get_num_threads()} threads",
            date=date.today().isoformat(),
        )
        self.rows, self.complete = [], False
        if self.path.exists():
            before = Records.load(self.path)
            compared = [name for name in self.about if name not in ("machine", "date")]
            same = all(before.about.get(name) == self.about[name] for name in compared)
            if same and not before.complete:
                self.rows = before.rows

    def find(self, **facts: Any) -> dict[str, Any] | None:
        """The first record with these facts, or None."""
        return next(self.all(**facts), None)

    def all(self, **facts: Any) -> Iterator[dict[str, Any]]:
        """The records with these facts."""
        return (row for row in self.rows if all(row.get(name) == value for name, value in facts.items()))

    def add(self, row: dict[str, Any]) -> None:
        """Add a record and save."""
        self.rows.append(row)
        self._save()

    def finish(self) -> None:
        """Mark as complete and save."""
        self.complete = True
        self._save()

    def _save(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        rows = ",\n".join(json.dumps(row, allow_nan=False) for row in self.rows)
        with written_whole(self.path) as unfinished:
            unfinished.write_text(
                f'{{"version": {VERSION}, "complete": {json.dumps(self.complete)},\n'
                f'"about": {json.dumps(self.about)},\n"rows": [\n{rows}\n]}}\n'
            )
