# SPDX-License-Identifier: GPL-2.0
"""VMs are found whichever thread of their VMM has made them, and at once not found where there is none."""

from __future__ import annotations

import tempfile
import unittest
from pathlib import Path
from unittest import mock

from vm import find
from vm.host import Bridge, Dlh

VMM = 100
OTHER = 300


class TestFind(unittest.TestCase):
    def setUp(self) -> None:
        directory = tempfile.TemporaryDirectory()
        self.addCleanup(directory.cleanup)
        root = Path(directory.name)
        self.debugfs, self.proc = root / "debug", root / "proc"
        for name, path in (("DEBUGFS", self.debugfs), ("PROC", self.proc)):
            patch = mock.patch.object(find, name, path)
            patch.start()
            self.addCleanup(patch.stop)
        for module in ("kvm", "kvm_dlh", "ksm_bridge"):
            (self.debugfs / module).mkdir(parents=True)
        # KVM's own counters lie beside its directories of VMs.
        (self.debugfs / "kvm/exits").touch()
        self.process(VMM, (100, 101, 102))
        self.process(OTHER, (300,))

    def process(self, pid: int, tids: tuple[int, ...], state: str = "S", flags: int = 0) -> None:
        for tid in tids:
            (self.proc / f"{pid}/task/{tid}").mkdir(parents=True, exist_ok=True)
        (self.proc / f"{pid}/stat").write_text(f"{pid} (a (VMM) x) {state} 1 1 1 0 -1 {flags} 5\n")

    def vm(self, module: str, name: str, stats: str = "submitted 3\n") -> Path:
        path = self.debugfs / module / name
        path.mkdir()
        if module != "kvm":
            (path / "stats").write_text(stats)
        return path

    def test_a_vm_that_the_first_thread_made(self) -> None:
        path = self.vm("kvm_dlh", "100-9")
        self.vm("kvm_dlh", "300-9")
        self.assertEqual(find.directories("kvm_dlh", VMM), [path])
        self.assertEqual(Dlh(VMM).get("submitted"), 3)

    def test_a_vm_that_another_thread_made(self) -> None:
        paths = {module: self.vm(module, "102-14") for module in ("kvm", "kvm_dlh", "ksm_bridge")}
        for module, path in paths.items():
            self.assertEqual(find.directory(module, VMM), path)

    def test_a_vm_whose_maker_has_ended(self) -> None:
        """Its thread's number may even be another process by now."""
        named = self.vm("kvm_dlh", "300-14.7", "vmm_pid 100\nsubmitted 5\n")
        kvm = self.vm("kvm", "300-14")
        self.assertEqual(find.directory("kvm_dlh", VMM), named)
        self.assertEqual(find.directories("kvm_dlh", OTHER), [])
        self.assertEqual(find.directory("kvm", VMM), kvm)
        self.assertEqual(Dlh(VMM).get("submitted"), 5)

    def test_a_vmm_without_a_vm_is_an_error_at_once(self) -> None:
        self.vm("kvm", "300-14")
        self.vm("kvm_dlh", "300-14")
        for counters in (Dlh(VMM), Bridge(VMM)):
            with self.assertRaisesRegex(find.NoVm, "no VM of process 100.*300-14"):
                counters.get("executed")

    def test_a_vm_that_the_bridge_has_not_met(self) -> None:
        self.vm("kvm", "101-14")
        self.assertEqual(Bridge(VMM).get("merged_pages"), 0)
        with self.assertRaises(find.NoVm):
            Dlh(VMM).all()

    def test_a_vmm_that_has_ended_has_nothing(self) -> None:
        for state, flags in (("Z", 0), ("R", find.PF_EXITING)):
            self.process(VMM, (100,), state, flags)
            self.assertEqual(Dlh(VMM).all(), {})
        self.assertEqual(Dlh(4321).all(), {})

    def test_several_vms_are_not_one(self) -> None:
        self.vm("kvm_dlh", "100-9")
        self.vm("kvm_dlh", "101-10")
        self.assertEqual(len(find.directories("kvm_dlh", VMM)), 2)
        with self.assertRaisesRegex(find.NoVm, "several"):
            Dlh(VMM).all()


if __name__ == "__main__":
    unittest.main()
