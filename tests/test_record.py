"""The records say which files were run against a real host; a change to them needs a new run of run_real.py."""

import json

import pytest
from contract.run_real import SUITES, hashes


@pytest.mark.parametrize("host", SUITES)
def test_the_record_of_the_real_host_is_of_these_files(host):
    suite = SUITES[host]
    record = json.loads(suite.record.read_text(encoding="utf-8"))
    changed = [name for name, value in hashes(suite).items() if record["hashes"][name] != value]
    assert not changed, (
        f"{', '.join(changed)} changed since the run on {record['host']}: python tests/contract/run_real.py --host {host}"
    )
    assert record["tests"]["tests"] > 90
    assert record["tests"]["failures"] == record["tests"]["errors"] == record["tests"]["skipped"] == 0
