# SPDX-License-Identifier: GPL-2.0
"""tools/lib/doc-names finds names in documents that nothing has."""

import subprocess
import tempfile
import unittest
from pathlib import Path

TOOL = Path(__file__).resolve().parents[3] / "tools/lib/doc-names"


class DocNames(unittest.TestCase):
    """A tree of one source, one document, and a kernel of one file."""

    def look(self, document: str) -> str:
        """What is said of a document."""
        with tempfile.TemporaryDirectory() as folder:
            for name, text in {
                "rust/one/one.rs": "fn take_all() {} struct OneRing;",
                "kernel/mm/memory.c": "void zap_some_range(void) {}",
                "docs/it.md": document,
            }.items():
                path = Path(folder, name)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(text)
            run = subprocess.run(
                [TOOL, "kernel", "docs/it.md"],
                input="rust/one/one.rs\ndocs/it.md\n",
                cwd=folder,
                stdout=subprocess.PIPE,
                text=True,
                check=False,
            )
            self.assertEqual(run.returncode, int(bool(run.stdout)))
            return run.stdout

    def test_what_is_there(self) -> None:
        self.assertEqual(self.look("`OneRing::take_all()`, `zap_some_range`, `rust/one/one.rs`, `one/one.rs`, `one.rs`, `it.md`"), "")

    def test_words_of_every_day_and_names_without_backticks(self) -> None:
        self.assertEqual(self.look("`drain`, `insmod`, `/sys/kernel/x`, take_none and NoRing"), "")

    def test_what_nothing_has(self) -> None:
        said = self.look("`OneRing::take_none`, `NoRing`, `zap_no_range`, `rust/two/two.rs`, `two.rs`")
        for name in ("take_none", "NoRing", "zap_no_range", "rust/two/two.rs", "two.rs"):
            self.assertIn(name, said)
        self.assertNotIn("OneRing", said)
