# SPDX-License-Identifier: GPL-2.0
"""The KTAP parser counts what was said, and what was not."""

import unittest

from vm.ktap_parser import KtapParser


def counts(text: str, status: int | None = 0) -> tuple[int, int, int]:
    parser = KtapParser()
    for line in text.splitlines():
        parser.line(line)
    parser.end(status)
    assert len(parser.failures) == parser.failed
    return parser.passed, parser.failed, parser.skipped


class Parse(unittest.TestCase):
    def test_results_are_counted(self) -> None:
        text = "KTAP version 1\n1..3\nok 1 - a\nnot ok 2 - b\nok 3 - c # SKIP no pages\n"
        self.assertEqual(counts(text, 1), (1, 1, 1))

    def test_other_lines_do_not_matter(self) -> None:
        text = "hello\nKTAP version 1\n1..1\n# ok 7\n    ok 1 - sub\nokay\nok 1 - a\r\n"
        self.assertEqual(counts(text), (1, 0, 0))

    def test_skipping_everything(self) -> None:
        self.assertEqual(counts("KTAP version 1\n1..0 # SKIP no hugepages\n"), (0, 0, 1))

    def test_silence_fails(self) -> None:
        self.assertEqual(counts("")[1], 2)

    def test_missing_version(self) -> None:
        self.assertEqual(counts("1..1\nok 1\n"), (1, 1, 0))

    def test_missing_plan(self) -> None:
        self.assertEqual(counts("KTAP version 1\nok 1 - a\n"), (0, 2, 0))

    def test_plan_at_the_end(self) -> None:
        self.assertGreater(counts("KTAP version 1\nok 1 - a\n1..1\n")[1], 0)

    def test_missing_results(self) -> None:
        self.assertEqual(counts("KTAP version 1\n1..2\nok 1 - a\n"), (1, 1, 0))

    def test_too_many_results(self) -> None:
        self.assertEqual(counts("KTAP version 1\n1..1\nok 1 - a\nok 2 - b\n"), (1, 1, 0))

    def test_repeated_number(self) -> None:
        self.assertEqual(counts("KTAP version 1\n1..2\nok 1 - a\nok 1 - a\n"), (1, 1, 0))

    def test_no_number(self) -> None:
        self.assertEqual(counts("KTAP version 1\n1..1\nok - a\n"), (0, 1, 0))

    def test_empty_plan(self) -> None:
        self.assertEqual(counts("KTAP version 1\n1..0\n"), (0, 1, 0))

    def test_two_plans(self) -> None:
        self.assertEqual(counts("KTAP version 1\n1..1\n1..1\nok 1 - a\n"), (1, 1, 0))

    def test_unfinished_work_is_no_pass(self) -> None:
        self.assertEqual(counts("KTAP version 1\n1..1\nok 1 - a # TODO later\n"), (0, 1, 0))

    def test_exit_status(self) -> None:
        self.assertEqual(counts("KTAP version 1\n1..1\nok 1 - a\n", 3), (1, 1, 0))


if __name__ == "__main__":
    unittest.main()
