"""The fakes can be imported; the property tests say how many steps they ran."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))


def pytest_terminal_summary(terminalreporter):
    for report in terminalreporter.stats.get("passed", []):
        for name, value in report.user_properties:
            if name == "pool steps":
                terminalreporter.write_line(f"{report.nodeid}: {value}")
