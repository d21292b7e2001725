# SPDX-License-Identifier: GPL-2.0
"""Which tests run beside each other."""

import threading
import unittest
from pathlib import Path

from vm.beside import Room, mebibytes, run_all
from vm.machine import Options
from vm.runner import Test

HERE = Room(cpus=2, mib=8192)


def test(name: str, smp: int, mem: str = "2G", icount: bool = False) -> Test:
    return Test(Path(name), Options(smp=smp, mem=mem, icount=icount))


class Beside(unittest.TestCase):
    """Runs that only note what runs beside them."""

    def run_tests(self, *tests: Test) -> dict[str, set[str]]:
        """Runs them, each as long as any other may be started; what was seen beside which."""
        beside: dict[str, set[str]] = {one.name: set() for one in tests}
        running: set[str] = set()
        changed = threading.Condition()

        def run(one: Test) -> int:
            with changed:
                running.add(one.name)
                for name in running:
                    beside[name] |= running
                changed.notify_all()
                changed.wait_for(lambda: len(beside[one.name]) > 1, timeout=0.2)
                running.remove(one.name)
            return len(one.name)

        results = run_all(tests, HERE, run)
        self.assertEqual(results, [len(one.name) for one in tests])
        return {name: seen - {name} for name, seen in beside.items()}

    def test_processors(self) -> None:
        seen = self.run_tests(test("two", 2), test("a", 1), test("other", 2), test("bb", 1))
        self.assertEqual(seen, {"two": set(), "a": {"bb"}, "other": set(), "bb": {"a"}})

    def test_one_thread_counts_once(self) -> None:
        seen = self.run_tests(test("a", 2, icount=True), test("bb", 1))
        self.assertEqual(seen, {"a": {"bb"}, "bb": {"a"}})

    def test_memory(self) -> None:
        seen = self.run_tests(test("a", 1, "6G"), test("bb", 1, "6G"))
        self.assertEqual(seen, {"a": set(), "bb": set()})

    def test_too_large_runs_alone(self) -> None:
        seen = self.run_tests(test("a", 1), test("huge", 4, "32G"))
        self.assertEqual(seen, {"a": set(), "huge": set()})


class Sizes(unittest.TestCase):
    def test_units(self) -> None:
        self.assertEqual((mebibytes("6G"), mebibytes("512M")), (6144, 512))


if __name__ == "__main__":
    unittest.main()
