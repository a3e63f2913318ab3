"""`python -m tests.kit.counts RUNG...`: how many tests of these rungs passed, failed and were skipped, from their JUnit files.

`tests/run` tries the failed tests of a rung once more. The file of the first attempt is then build/test/RUNG-first.xml beside that
of the second, build/test/RUNG.xml, and a test counts once, by its last attempt.
"""

from __future__ import annotations

import sys
import xml.etree.ElementTree as ET
from collections import Counter
from pathlib import Path

FOLDER = Path("build/test")


def outcomes(file: Path) -> dict[tuple[str, str], str]:
    """By class and name of each test: "passed", "failed" or "skipped"; nothing where the file is missing."""
    found: dict[tuple[str, str], str] = {}
    for case in ET.parse(file).getroot().iter("testcase") if file.exists() else ():
        parts = {part.tag for part in case}
        outcome = "failed" if parts & {"failure", "error"} else "skipped" if "skipped" in parts else "passed"
        key = (case.get("classname", ""), case.get("name", ""))
        # A test that fails and whose fixture fails after it stands there twice.
        found[key] = "failed" if found.get(key) == "failed" else outcome
    return found


def sentence(rungs: list[str], folder: Path = FOLDER) -> str:
    """The counts of all rungs together in words."""
    counts: Counter[str] = Counter()
    for rung in rungs:
        first, last = outcomes(folder / f"{rung}-first.xml"), outcomes(folder / f"{rung}.xml")
        counts.update({**first, **last}.values())
        counts["again"] += sum(first.get(test) == "failed" and outcome == "passed" for test, outcome in last.items())
    again = f" ({counts['again']} of them at the second attempt)" if counts["again"] else ""
    return f"{counts['passed']} passed{again}, {counts['failed']} failed, {counts['skipped']} skipped"


if __name__ == "__main__":
    print(sentence(sys.argv[1:]))
