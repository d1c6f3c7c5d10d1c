"""The record says which files were run against a real Forge; a change to them needs a new run of run_real.py."""

import json

from contract.run_real import RECORD, hashes


def test_the_record_of_the_real_forge_is_of_these_files():
    record = json.loads(RECORD.read_text(encoding="utf-8"))
    changed = [name for name, value in hashes().items() if record["hashes"][name] != value]
    assert not changed, (
        f"{', '.join(changed)} changed since the run on Forge {record['host']['commit']}: python tests/contract/run_real.py"
    )
    assert record["tests"]["tests"] > 90
    assert record["tests"]["failures"] == record["tests"]["errors"] == record["tests"]["skipped"] == 0
