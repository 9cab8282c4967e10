"""What an overview says of data of which nothing can be used."""

import json
from pathlib import Path

from qdist.core.spec.run_spec import resolve
from qdist.runtime.train.overview import overview


def test_data_without_a_sample_are_not_said_to_be_too_few_to_split(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text(f"{json.dumps({'question': 'q', 'log': 1})}\n" * 3)
    found = overview(resolve({"model": "any", "data": str(path)}), None, None, samples=1, limit=None)
    assert (found.bad, found.samples, found.held_out, found.notes) == (3, 0, 0, ())
