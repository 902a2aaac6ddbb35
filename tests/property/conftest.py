"""Counts of inputs that were tried, told at the end of the run."""


def pytest_terminal_summary(terminalreporter):
    """Print how many inputs of each kind were tried, and how many of them refused."""
    for report in terminalreporter.stats.get("passed", []):
        for name, value in report.user_properties:
            if name == "inputs":
                kind = report.nodeid.rpartition("::test_")[2].replace("_", " ")
                terminalreporter.write_line(f"{kind}: {value[0]} inputs tried, {value[1]} refused in one line")
