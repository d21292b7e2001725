# SPDX-License-Identifier: GPL-2.0
"""tools/lib/circles finds what it is there for, and nothing else."""

import subprocess
import tempfile
import unittest
from pathlib import Path

TOOL = Path(__file__).resolve().parents[3] / "tools/lib/circles"


class Circles(unittest.TestCase):
    """Crates of a few lines."""

    def look(self, **files: str) -> str:
        """What is said of a crate `one` of these files; `__` in a name stands for a folder."""
        with tempfile.TemporaryDirectory() as folder:
            crate = Path(folder) / "one"
            paths = []
            for name, text in files.items():
                paths.append(crate / f"{name.replace('__', '/')}.rs")
                paths[-1].parent.mkdir(parents=True, exist_ok=True)
                paths[-1].write_text(text)
            run = subprocess.run([TOOL, *paths], stdout=subprocess.PIPE, text=True, check=False)
            self.assertEqual(run.returncode, int(bool(run.stdout)))
            return run.stdout

    def test_one_way(self) -> None:
        self.assertEqual(self.look(one="mod a; mod b; use a::A;", a="use crate::b::B;", b="// use crate::a::A;"), "")

    def test_two_files(self) -> None:
        said = self.look(one="mod a; mod b;", a="use crate::b::B;", b="use crate::{c::C, a::{A, D}};")
        self.assertIn("a.rs -> b.rs", said)
        self.assertIn("b.rs -> a.rs", said)

    def test_a_path_in_the_middle(self) -> None:
        self.assertIn("b.rs -> a.rs", self.look(one="mod a; mod b;", a="use super::b;", b="fn f() { crate::a::g() }"))

    def test_through_the_first_file(self) -> None:
        said = self.look(one="mod a; mod b; pub use b::B;", a="use crate::B;", b="use crate::a::A;")
        self.assertIn("a.rs -> b.rs", said)

    def test_what_the_first_file_has_itself(self) -> None:
        self.assertIn("a.rs -> one.rs", self.look(one="mod a; use a::A; struct B;", a="use crate::B;"))

    def test_a_file_and_its_folder_are_one(self) -> None:
        self.assertEqual(self.look(one="mod a;", a="mod b; use b::B;", a__b="use super::A;"), "")
        said = self.look(one="mod a; mod c;", a="mod b;", a__b="use crate::c::C;", c="use crate::a::A;")
        self.assertIn("a.rs -> c.rs", said)

    def test_inside_a_folder(self) -> None:
        said = self.look(one="mod a;", a="mod b; mod c;", a__b="use super::c::C;", a__c="use super::b::B;")
        self.assertIn("b.rs -> c.rs", said)

    def test_tests_do_not_count(self) -> None:
        text = "struct B;\n#[cfg(test)]\nmod tests { use crate::a::A; }"
        self.assertEqual(self.look(one="mod a; mod b;", a="use crate::b::B;", b=text), "")
