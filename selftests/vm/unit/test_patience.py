# SPDX-License-Identifier: GPL-2.0
"""Waiting: what comes late has come, what grows is alive, and a file that cannot be read right now is read."""

from __future__ import annotations

import errno
import os
import subprocess
import tempfile
import time
import unittest
from pathlib import Path
from unittest import mock

from vm import machine
from vm.machine import Machine, Options
from vm.patience import wait_until
from vm.running import read_log


class TestWaitUntil(unittest.TestCase):
    def test_it_is_looked_at_once_more(self) -> None:
        """The one who waits may have had no turn for long, and the time be up when it has come."""
        looks = iter((False, True))
        with mock.patch.object(time, "monotonic", side_effect=(0.0, 1000.0)):
            self.assertTrue(wait_until(lambda: next(looks)))

    def test_what_does_not_come(self) -> None:
        self.assertFalse(wait_until(lambda: False, timeout=0.01, pause=0.001))


class TestReadLog(unittest.TestCase):
    def test_a_file_that_is_being_written(self) -> None:
        path = mock.Mock()
        path.read_text.side_effect = (OSError(errno.ENODATA, "no data"), OSError(errno.ENODATA, "no data"), "line\n")
        self.assertEqual(read_log(path), "line\n")

    def test_a_file_that_is_not_there(self) -> None:
        with self.assertRaises(FileNotFoundError):
            read_log(Path("/no/such/file"))

    def test_an_empty_file(self) -> None:
        path = mock.Mock()
        path.read_text.return_value = ""
        self.assertEqual(read_log(path), "")


class TestSignsOfLife(unittest.TestCase):
    def setUp(self) -> None:
        directory = tempfile.TemporaryDirectory()
        self.addCleanup(directory.cleanup)
        patch = mock.patch.dict(os.environ, KREL="none")
        patch.start()
        self.addCleanup(patch.stop)
        self.machine = Machine(Path(directory.name), Options(silence=2))
        self.machine.share.mkdir()
        self.machine.output_log.touch()

    def follow(self, script: str, timeout: float = 60) -> tuple[str, list[str]]:
        """Why a process in place of the emulator was given up, if it was; and what it said."""
        lines: list[str] = []
        with subprocess.Popen(["sh", "-c", script], cwd=self.machine.results) as process:
            said = self.machine._follow(process, time.monotonic() + timeout, lines.append)
            process.kill()
        return said, lines

    def test_the_end(self) -> None:
        self.assertEqual(self.follow("echo one >>output.log; printf two >>output.log"), ("", ["one", "two"]))

    def test_silence(self) -> None:
        said, _ = self.follow("touch share/booted; exec sleep 60")
        self.assertIn("no sign of life", said)

    def test_kernels_that_say_something(self) -> None:
        for log in ("kernel.log", "share/guest1.log"):
            with self.subTest(log):
                self.assertEqual(
                    self.follow(f"touch share/booted; for i in 1 2 3 4 5 6 7 8 9 10 11 12; do sleep 0.2; echo $i >>{log}; done")[0],
                    "",
                )

    def test_booting_takes_its_time(self) -> None:
        """Before it has booted it may be silent for longer, but not for ever."""
        self.assertEqual(self.follow("sleep 3")[0], "")
        with mock.patch.object(machine, "BOOT_SILENCE", 0.3):
            self.assertIn("no sign of life", self.follow("exec sleep 60")[0])

    def test_what_never_ends(self) -> None:
        said, _ = self.follow("while :; do echo x >>output.log; sleep 0.1; done", timeout=1)
        self.assertEqual(said, "the time is up")


if __name__ == "__main__":
    unittest.main()
