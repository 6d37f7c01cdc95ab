"""Runs the conformance suite on the GPU within a time limit, and reports the results."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from xml.etree import ElementTree

from benchmarks import machine

ROOT = Path(__file__).parent.parent
SUITE = "tests/gpu/test_conformance_on_gpu.py"
PARTS = {"triton": "triton", "the rest": "not triton"}  # of the suite, as pytest's -k takes them
ENDING = 20  # seconds for pytest to report, once it is interrupted


def run(part, seconds):
    """Runs a part of the suite; tests that did not finish in time are not among the results."""
    workers = max(0, machine.cores() - 4)
    begin, stopped = time.perf_counter(), False
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [
            *(sys.executable, "-m", "pytest", SUITE, "-k", PARTS[part]),
            *("-m", "gpu and not slow", "-n", str(workers), "-p", "no:cacheprovider"),
            *("-q", "--tb=short", f"--junitxml={report}"),
        ]
        # In a group of its own, as its workers are to be ended with it.
        process = subprocess.Popen(command, cwd=ROOT, start_new_session=True)
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            stopped = True
            process.send_signal(signal.SIGINT)
            try:
                process.wait(ENDING)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
        found = _outcomes(report) if report.exists() else {}
    took = round(time.perf_counter() - begin, 1)
    return {"tests": part, "seconds": took, "stopped": stopped, "exit": process.returncode, **found}


def _outcomes(report):
    """Returns how many tests passed and were skipped, and the names of the failed ones."""
    cases = list(ElementTree.parse(report).iter("testcase"))
    failed = [c.get("name") for c in cases if c.find("failure") is not None]
    failed += [c.get("name") for c in cases if c.find("error") is not None]
    skipped = sum(c.find("skipped") is not None for c in cases)
    return {
        "passed": len(cases) - len(set(failed)) - skipped,
        "skipped": skipped,
        "failed": sorted(set(failed)),
    }
