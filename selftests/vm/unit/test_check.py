# SPDX-License-Identifier: GPL-2.0
"""configs/check names all that keeps the modules from being built, before the build does it in its own words.

Runs in the Debian root, with the build folder that KDIR names and with PATHs that lack one tool or another.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
import unittest
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[3]
CHECK = REPOSITORY / "configs/check"
KDIR = os.environ.get("KDIR", "")


def option(name: str) -> str:
    """An option of the kernel that KDIR is for."""
    lines = (Path(KDIR) / ".config").read_text().splitlines()
    return next(line.split("=", 1)[1].strip('"') for line in lines if line.startswith(f"{name}="))


@unittest.skipUnless(KDIR, "KDIR names no build folder: tools/enter sets it")
class TestCheck(unittest.TestCase):
    def setUp(self) -> None:
        directory = tempfile.TemporaryDirectory()
        self.addCleanup(directory.cleanup)
        self.directory = Path(directory.name)

    def path(self, *without: str, **instead: str) -> str:
        """A PATH with all tools of this machine but some, and with shell scripts in place of others."""
        binaries = self.directory / "bin"
        binaries.mkdir()
        for tool in Path("/usr/bin").iterdir():
            if tool.name not in (*without, *instead):
                (binaries / tool.name).symlink_to(tool)
        for name, script in instead.items():
            (binaries / name).write_text(f"#!/bin/sh\n{script}\n")
            (binaries / name).chmod(0o755)
        return str(binaries)

    def run_check(self, path: str, *arguments: str, kdir: str = KDIR, **environment: str) -> tuple[int, list[str]]:
        """Its exit status, and what it says."""
        run = subprocess.run(
            [CHECK, kdir, *arguments],
            env={**os.environ, "PATH": path, **environment},
            capture_output=True,
            text=True,
            check=False,
        )
        self.assertEqual(run.stdout, "")
        return run.returncode, run.stderr.splitlines()

    def test_this_root_can_build(self) -> None:
        self.assertEqual(self.run_check(self.path()), (0, []))

    def test_another_rustc_is_named_with_the_kernels(self) -> None:
        other = "rustc 1.97.1 (abcdef 2026-01-01)"
        status, said = self.run_check(self.path(rustc=f"echo '{other}'"))
        self.assertEqual(status, 1)
        self.assertEqual(len(said), 1)
        self.assertIn(option("CONFIG_RUSTC_VERSION_TEXT"), said[0])
        self.assertIn(other, said[0])

    def test_another_build_of_the_same_version_is_refused(self) -> None:
        same = option("CONFIG_RUSTC_VERSION_TEXT").split(" (built")[0]
        status, said = self.run_check(self.path(rustc=f"echo '{same} (elsewhere)'"))
        self.assertEqual((status, len(said)), (1, 1))

    def test_a_rustc_that_fails(self) -> None:
        status, said = self.run_check(self.path(rustc="echo no toolchain is chosen >&2; exit 1"))
        self.assertEqual((status, len(said)), (1, 1))
        self.assertIn("no toolchain is chosen", said[0])

    def test_make_says_which_rustc(self) -> None:
        other = self.directory / "other"
        other.write_text("#!/bin/sh\necho rustc 2.0.0\n")
        other.chmod(0o755)
        path = self.path()
        status, said = self.run_check(path, f"RUSTC={other}")
        self.assertEqual((status, len(said)), (1, 1))
        self.assertIn("rustc 2.0.0", said[0])
        # The kernel's build does not take it from the environment, so that does not matter here.
        self.assertEqual(self.run_check(path, RUSTC=str(other)), (0, []))

    def test_each_tool_that_is_missing_is_named_with_its_package(self) -> None:
        compiler = option("CONFIG_CC_VERSION_TEXT").split()[0]
        prefix = compiler[: compiler.index("gcc")]
        packages = {
            "rustc": "rustc",
            "bindgen": "bindgen",
            "pahole": "dwarves",
            "make": "make",
            compiler: compiler.removeprefix(prefix),
            f"{prefix}ld": "binutils",
        }
        # Without make it cannot ask what the compiler is called.
        for lacking in ([tool for tool in packages if tool != "make"], ["make"]):
            with self.subTest(lacking):
                self.directory = Path(tempfile.mkdtemp(dir=self.directory))
                status, said = self.run_check(self.path(*lacking))
                self.assertEqual((status, len(said)), (1, len(lacking)))
                for tool in lacking:
                    lines = [line for line in said if line.startswith(f"configs/check: there is no {tool}")]
                    self.assertEqual(len(lines), 1, said)
                    self.assertTrue(lines[0].endswith(f"in Debian it is in {packages[tool]}"), lines)

    def test_a_bindgen_without_libclang(self) -> None:
        status, said = self.run_check(self.path(), LIBCLANG_PATH="/nowhere")
        self.assertEqual((status, len(said)), (1, 1))
        self.assertIn("libclang-dev", said[0])

    def test_another_compiler_is_a_warning(self) -> None:
        status, said = self.run_check(self.path(), "CC=clang")
        self.assertEqual((status, len(said)), (0, 1))
        self.assertIn("warning", said[0])
        self.assertIn(option("CONFIG_CC_VERSION_TEXT"), said[0])

    def test_programs_of_the_folder_that_do_not_run_here(self) -> None:
        says = {
            "echo '  libelf.so.1 => not found'": "finds no libelf.so.1; in Debian libelf-dev",
            """echo "$1: /lib/libc.so.6: version 'GLIBC_2.99' not found (required by $1)" >&2""": "version 'GLIBC_2.99' not found",
        }
        for script, words in says.items():
            with self.subTest(words):
                self.directory = Path(tempfile.mkdtemp(dir=self.directory))
                status, said = self.run_check(self.path(ldd=script))
                self.assertEqual(status, 1)
                self.assertIn("scripts/mod/modpost", said[0])
                for line in said:
                    self.assertIn(words, line)

    def test_how_it_is_used(self) -> None:
        for arguments, status in (([], 1), (["--help"], 0)):
            run = subprocess.run([CHECK, *arguments], capture_output=True, text=True, check=False)
            self.assertEqual(run.returncode, status)
            self.assertIn("usage: configs/check KDIR", run.stdout + run.stderr)

    def test_all_that_is_wrong_at_once(self) -> None:
        kdir = self.directory / "build"
        kdir.mkdir()
        config = (Path(KDIR) / ".config").read_text()
        (kdir / ".config").write_text(config.replace("CONFIG_MMU_NOTIFIER=y", "").replace("CONFIG_KVM_GUEST=y", ""))
        status, said = self.run_check(self.path("bindgen", rustc="echo rustc 1"), kdir=str(kdir))
        self.assertEqual(status, 1)
        for words in ("CONFIG_MMU_NOTIFIER", "CONFIG_KVM_GUEST", "no Rust metadata", "rustc 1'", "no bindgen", "modpost"):
            self.assertEqual(sum(words in line for line in said), 1, (words, said))

    def test_make_stops_there(self) -> None:
        path = self.path("bindgen")
        run = subprocess.run(
            ["make", "-C", REPOSITORY, f"KDIR={KDIR}", "modules"],
            env={**os.environ, "PATH": path},
            capture_output=True,
            text=True,
            check=False,
        )
        self.assertNotEqual(run.returncode, 0)
        self.assertIn("there is no bindgen", run.stderr)
        self.assertEqual(run.stdout, "", "nothing has been built")


if __name__ == "__main__":
    unittest.main()
