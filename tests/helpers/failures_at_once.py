"""A pytest plugin (`-p tests.helpers.failures_at_once`): a failure is printed when it happens, for runs that may be cut short."""


def pytest_runtest_logreport(report) -> None:
    if report.failed:
        print(f"\nFAILED {report.nodeid}\n{report.longreprtext[-1500:]}", flush=True)
