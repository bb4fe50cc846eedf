"""Memory of service and client does not grow with the cases that go through them; the benchmark does it with 10,000."""

import pytest

from fedcmr.simulations.benchmarks.delivery import growth_mib, main, measure

pytestmark = pytest.mark.slow


def test_memory_stays_flat_over_a_stream(tmp_path):
    measurements = measure(tmp_path, 1000, num_measurements=5)
    assert [one.cases for one in measurements] == [200, 400, 600, 800, 1000]
    size = sum(path.stat().st_size for path in (tmp_path / "out" / "cases").iterdir())
    assert size > 60 * 2**20, "what passes through is more than what may be held"
    assert measurements[0].server_mib > 20 and measurements[0].client_mib > 10
    assert max(growth_mib(measurements)) < 16


def test_too_few_cases_are_refused(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["delivery", "--cases", "1"])
    assert main() == 2
    assert "Expected --cases" in capsys.readouterr().err
