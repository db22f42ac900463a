"""Print the largest measured differences at the end of the test report."""

from collections import defaultdict
from typing import Any

MEASURED = "largest difference of a logit"


def pytest_terminal_summary(terminalreporter: Any) -> None:
    found = defaultdict(list)
    for report in terminalreporter.getreports("passed"):
        for name, value in report.user_properties:
            if name.startswith(MEASURED):
                found[name].append(value)
    for name, values in sorted(found.items()):
        terminalreporter.write_line(f"{name}, {len(values)} comparisons: {max(values):.1e}")
