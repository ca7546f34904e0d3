"""A pytest plugin (`-p tests.helpers.failures_at_once`) for runs that may be cut short: a failure is printed when it
happens, and TEST_SHARE=i/n runs every n-th test from the i-th on."""

import os


def pytest_collection_modifyitems(items: list) -> None:
    first, step = (int(word) for word in os.environ.get("TEST_SHARE", "0/1").split("/"))
    items[:] = items[first::step]


def pytest_runtest_logreport(report) -> None:
    if report.failed:
        print(f"\nFAILED {report.nodeid}\n{report.longreprtext[-1500:]}", flush=True)
