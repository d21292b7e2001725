#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0
# vm: smp=2 mem=4G timeout=200 append="hugepages=16"
"""The cases of 39-kinds are worth something: a bridge that takes all memory for anonymous is found out.

The module `no_vma_check` breaks a rule on purpose (DESIGN.md rule 3).
"""

import re
import subprocess

from vm import ktap

# What must be found, by the name of its case.
CASES = (
    "a sealed memfd is left alone",
    "private pages over a file's are left alone",
    "locked memory is left alone",
    "memory armed with userfaultfd is left alone",
    "a memfd armed with userfaultfd is left alone",
)

ktap.plan(len(CASES) + 1)
subprocess.run(["insmod", "build/modules/kvm_dlh.ko", "budget_us=1000000"], check=True)
subprocess.run(["insmod", "build/modules-no_vma_check/ksm_bridge.ko"], check=True)
log = subprocess.run(["dmesg"], check=True, stdout=subprocess.PIPE, text=True).stdout
ktap.ok("ksm_bridge: TEST BUILD" in log, "the module that breaks the rule says so")
for case in CASES:
    command = ["build/bin/dlh-vmm", "ktap", "--only", case, "kinds"]
    output = subprocess.run(command, stdout=subprocess.PIPE, text=True).stdout
    found = re.findall(rf"^(not ok|ok) \d+ - {re.escape(case)}", output, re.MULTILINE)
    ktap.ok("not ok" in found, f"found without the check: {case}", output)
subprocess.run(["rmmod", "ksm_bridge", "kvm_dlh"], check=True)
ktap.done()
