# SPDX-License-Identifier: GPL-2.0
"""The table of docs/compatibility.md is read as it is written, and outcomes are named after most pages."""

import unittest

from vm.compatibility import Row, expected, outcome, read, write

SEEN = [Row("7.3.4", "QEMU q35", "11.1", "private anonymous", "merged")]
OTHER = [Row("7.2.1", "cloud-hypervisor", "50.0", "private anonymous", "merged")]


class Table(unittest.TestCase):
    def test_what_is_written_is_read(self) -> None:
        self.assertEqual(read(write(SEEN, [])), SEEN)

    def test_what_was_not_seen_stays(self) -> None:
        old = [SEEN[0]._replace(kernel="7.2.1", outcome="kept (`skipped_kind`)")]
        self.assertEqual(read(write(SEEN, old + OTHER)), SEEN + OTHER)

    def test_versions_make_no_difference(self) -> None:
        row = SEEN[0]._replace(kernel="8.0.1", version="12.0")
        self.assertEqual(expected(row, SEEN), "merged")

    def test_what_is_not_known(self) -> None:
        self.assertEqual(expected(OTHER[0], SEEN), "not in the table")


class Outcome(unittest.TestCase):
    def test_most_pages_count(self) -> None:
        before = {"merged_pages": 1000, "skipped_partial": 0, "runs": 0}
        after = {"merged_pages": 1010, "skipped_partial": 500, "runs": 9000}
        self.assertEqual(outcome(before, after), "kept (`skipped_partial`)")

    def test_a_vm_that_was_not_known_before(self) -> None:
        self.assertEqual(outcome({}, {"merged_pages": 7, "skipped_kind": 2}), "merged")

    def test_nothing_has_happened(self) -> None:
        self.assertEqual(outcome({}, {}), "not reported")
        self.assertEqual(outcome({"merged_pages": 7}, {"merged_pages": 7}), "not reported")


if __name__ == "__main__":
    unittest.main()
