#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0
# vm: smp=2 mem=2G timeout=240
"""Whose memory is given up: the parameter `allow`, and the file `allow` of each VM.

The guests are `dlh-vmm tenant`, which looks at its own memory, not at statistics.
"""

import errno
import os
import subprocess
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from vm import ktap
from vm.host import CONTROL, DEBUGFS, MODULES
from vm.patience import wait_until

PARAMETER = Path("/sys/module/ksm_bridge/parameters/allow")
CGROUPS = Path("/sys/fs/cgroup")
FREE_HUGE_PAGES = Path("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages")
VMM = "/src/kvm-dlh/build/bin/dlh-vmm"
# Pages of each kind that a tenant reports, and what it says where they are given up, or declined.
PAGES = 512
GIVEN = (0, PAGES)
KEPT = (-1109, 0)
USERS = (1001, 1002)
BAD = (
    "",
    "yes",
    "ALL",
    "all,",
    "all,uid=1001",
    "all,none",
    "none,hugetlb",
    "hugetlb",
    "1001",
    "/alpha",
    "uid=",
    "uid=x",
    "uid=-1",
    "uid=4294967295",
    "uid=1001,,1002",
    "uid=1001 1002",
    "cgroup=alpha",
    "cgroup=/alpha/",
    "cgroup=/alpha//inner",
    "cgroup=/alpha/../beta",
    "cgroup=/sys/fs/cgroup/alpha",
    "uid=" + ",".join(["1001"] * 900),
)


class Tenant:
    """A VMM of a user, in a cgroup."""

    def __init__(self, *kinds: str, uid: int = 0, cgroup: str = "") -> None:
        self.kinds = kinds
        self.process = subprocess.Popen(
            [VMM, "tenant", *kinds],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
            user=uid,
            group=uid,
            extra_groups=(),
        )
        self.pid = self.process.pid
        if cgroup:
            self.move(cgroup)
        self._read("ready")

    def _line(self) -> str:
        assert self.process.stdout
        return self.process.stdout.readline().strip()

    def _read(self, expected: str) -> None:
        if (line := self._line()) != expected:
            raise RuntimeError(f"the tenant says {line!r}, not {expected!r}")

    def move(self, cgroup: str) -> None:
        (CGROUPS / cgroup / "cgroup.procs").write_text(str(self.pid))

    def report(self) -> list[tuple[int, int]]:
        """Reports all of its memory: for each kind the status and how many pages were given up."""
        assert self.process.stdin
        self.process.stdin.write("\n")
        line = self._line()
        numbers = [int(word) for word in line.split()] if line != "absent" else []
        return list(zip(numbers[::2], numbers[1::2], strict=True))

    def directories(self) -> list[Path]:
        """Those of its VMs, found as tools find them."""
        found = []
        for path in CONTROL.glob("*/vmm_pid"):
            try:
                if path.read_text() == f"{self.pid}\n":
                    found.append(path.parent)
            except OSError:
                # Another's, which has just gone.
                pass
        return found

    def directory(self) -> Path:
        """That of its VM, which comes a moment after its first report is answered."""
        wait_until(self.directories)
        (directory,) = self.directories()
        return directory

    def choose(self, choice: str) -> None:
        put(self.directory() / "allow", choice)

    def counted(self, name: str) -> int:
        """A counter of ksm_bridge. It goes by the name that the directory has in sysfs, too."""
        lines = (DEBUGFS / "ksm_bridge" / self.directory().name / "stats").read_text().splitlines()
        return int(dict(line.split() for line in lines)[name])

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        assert self.process.stdin and self.process.stdout
        self.process.stdout.close()
        self.process.stdin.close()


def insert(*arguments: str) -> bool:
    """Inserts ksm_bridge.ko."""
    command = ["insmod", MODULES / "ksm_bridge.ko", *arguments]
    return subprocess.run(command, check=False, stderr=subprocess.DEVNULL).returncode == 0


def remove() -> None:
    subprocess.run(["rmmod", "ksm_bridge"], check=True)


def log() -> list[str]:
    return subprocess.run(["dmesg"], check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()


def put(path: Path, text: str) -> None:
    """Writes in one go, and once: a Python file tries again what has failed."""
    descriptor = os.open(path, os.O_WRONLY)
    try:
        os.write(descriptor, text.encode())
    finally:
        os.close(descriptor)


def fails(action: Callable[[], object]) -> int:
    """The error that an action ends with, or 0."""
    try:
        action()
    except OSError as error:
        return error.errno or -1
    return 0


def default() -> None:
    """What holds where nobody has said anything: 6 results."""
    tenant = Tenant("anonymous", "memfd", "hugetlb", "private-hugetlb", uid=USERS[0])
    ktap.equal(PARAMETER.read_text(), "all\n", "the default is all")
    free = int(FREE_HUGE_PAGES.read_text())
    seen = tenant.report()
    ktap.equal(seen, [GIVEN, GIVEN, KEPT, KEPT], "all: memory is given up, but for what was set aside")
    ktap.ok(int(FREE_HUGE_PAGES.read_text()) < free, "all: the huge pages that the guest has filled are its own")
    counters = {name: tenant.counted(name) for name in ("declined_policy", "skipped_hugetlb", "merged_pages")}
    expected = {"declined_policy": 2, "skipped_hugetlb": 2 * PAGES, "merged_pages": 2 * PAGES}
    ktap.equal(counters, expected, "all: what was declined is counted, and only that")
    put(PARAMETER, "all,hugetlb")
    ktap.equal(tenant.report(), [GIVEN] * 4, "all,hugetlb: that, too")
    put(PARAMETER, "all")
    ktap.equal(tenant.report(), [GIVEN, GIVEN, KEPT, KEPT], "all: and no more")
    tenant.end()


def bad_values() -> None:
    """Every bad value is refused, with a word in the log, and changes nothing: 2 * len(BAD) + 4 results."""
    tenant = Tenant("anonymous", uid=USERS[0])
    put(PARAMETER, "uid=1001")
    for bad in BAD:
        what = f"allow={bad}" if len(bad) < 50 else f"{len(bad)} bytes"
        before = len(log())
        error = fails(lambda bad=bad: put(PARAMETER, bad or "\n"))
        lines = [line for line in log()[before:] if "ksm_bridge: allow=" in line]
        good = error == errno.EINVAL and len(lines) == 1 and f"allow={bad[:100]}" in lines[0]
        ktap.ok(good, f"{what} is refused with one line", error, lines)
        ktap.equal(PARAMETER.read_text(), "uid=1001\n", f"{what} changes nothing")
    ktap.equal(tenant.report(), [GIVEN], "the rules of before still hold")
    ktap.equal(oct(PARAMETER.stat().st_mode & 0o777), "0o644", "only root writes the parameter")
    for bad in ("maybe", "", "yes no", "1", "default yes"):
        error = fails(lambda bad=bad: tenant.choose(bad or "\n"))
        if error != errno.EINVAL:
            ktap.comment(f"{bad!r} gave {error}")
            break
    else:
        bad = ""
    ktap.equal(bad, "", "no other word is taken for a VM")
    ktap.equal((tenant.directory() / "allow").read_text(), "default\n", "and none of them changes anything")
    tenant.end()


def users_and_cgroups() -> None:
    """None until allowed, by user, by cgroup: 15 results."""
    put(PARAMETER, "none")
    one, other = (
        Tenant("anonymous", "hugetlb", uid=uid, cgroup=cgroup)
        for uid, cgroup in zip(USERS, ("alpha/inner", "alphabet"), strict=True)
    )

    def both(value: str) -> list[list[tuple[int, int]]]:
        put(PARAMETER, value)
        return [one.report(), other.report()]

    nothing, some, everything = [KEPT, KEPT], [GIVEN, KEPT], [GIVEN, GIVEN]
    for value, expected in (
        ("none", [nothing, nothing]),
        ("uid=1001", [some, nothing]),
        ("uid=1002\n", [nothing, some]),
        ("uid=7,1001;1002", [some, some]),
        ("uid=1002,hugetlb", [nothing, everything]),
        ("cgroup=/alpha", [some, nothing]),
        ("cgroup=/alphabet", [nothing, some]),
        ("cgroup=/alpha/inner,/alphabet", [some, some]),
        ("cgroup=/alpha/inner/most", [nothing, nothing]),
        ("cgroup=/", [some, some]),
        ("cgroup=/alpha;uid=1002;hugetlb", [everything, everything]),
    ):
        ktap.equal(both(value), expected, f"allow={value.strip()}")
    ktap.equal(PARAMETER.read_text(), "cgroup=/alpha;uid=1002;hugetlb\n", "it reads as it was written")
    put(PARAMETER, "cgroup=/alpha")
    one.move("alphabet")
    other.move("alpha")
    ktap.equal([one.report(), other.report()], [nothing, some], "a VMM that is moved is judged by where it is")
    kept = one.counted("declined_policy")
    one.report()
    ktap.equal(one.counted("declined_policy") - kept, 2, "each call that was declined is counted")
    # What goes and comes at the same place is not what was there.
    (CGROUPS / "beta").mkdir()
    put(PARAMETER, "cgroup=/beta")
    one.move("beta")
    seen = [one.report()]
    one.move("")
    (CGROUPS / "beta").rmdir()
    (CGROUPS / "gamma").mkdir()
    one.move("gamma")
    ktap.equal([*seen, one.report()], [some, nothing], "one cgroup goes and another comes")
    one.end()
    other.end()


def each_vm() -> None:
    """What root says of one VM: 13 results."""
    put(PARAMETER, "none")
    one, other = (Tenant("anonymous", "hugetlb", uid=uid) for uid in USERS)
    ktap.equal([one.report(), other.report()], [[KEPT, KEPT]] * 2, "none: nobody, but they are known")
    files = sorted(path.name for path in one.directory().iterdir())
    ktap.equal(files, ["again", "allow", "vmm_pid"], "the files of a VM")
    ktap.equal((one.directory() / "allow").read_text(), "default\n", "nothing is said of it")
    one.choose("yes\n")
    ktap.equal((one.directory() / "allow").read_text(), "yes\n", "yes is said of it")
    ktap.equal([one.report(), other.report()], [[GIVEN, GIVEN], [KEPT, KEPT]], "yes: all of its memory, and no other's")
    put(PARAMETER, "all,hugetlb")
    one.choose("no")
    ktap.equal([one.report(), other.report()], [[KEPT, KEPT], [GIVEN, GIVEN]], "no: although all others may")
    one.choose("default")
    ktap.equal(one.report(), [GIVEN, GIVEN], "default: as the parameter says")

    allow, again = one.directory() / "allow", one.directory() / "again"
    errors = [fails(lambda word=word: put(again, word)) for word in ("1", "1\n", "0", "2", "\n", "yes")]
    ktap.equal(errors, [0, 0] + [errno.EINVAL] * 4, "again takes 1, and nothing else")

    def as_user(script: str) -> int:
        command = ["bash", "-c", script, "-", str(allow), str(again)]
        return subprocess.run(
            command, check=False, user=USERS[0], group=USERS[0], extra_groups=(), stderr=subprocess.DEVNULL
        ).returncode

    codes = [as_user('read -r x <"$1"'), as_user('echo no >"$1"'), as_user('echo 1 >"$2"')]
    ktap.equal(codes, [0, 1, 1], "its user may read, and not write")
    ktap.equal(allow.read_text(), "default\n", "and has changed nothing")

    with allow.open() as kept:
        one.end()
        ktap.ok(wait_until(lambda: not allow.exists()), "the directory goes with the VM")
        ktap.equal(fails(kept.read), errno.ENODEV, "a file of it that is open has nothing more to say")
    ktap.equal(other.report(), [GIVEN, GIVEN], "and others go on")
    other.end()


def open_files() -> None:
    """Files that are open, and read, while the module goes: 4 results."""
    tenants = [Tenant("anonymous", uid=uid) for uid in USERS]
    for tenant in tenants:
        tenant.report()
    first, second = (tenant.directory() for tenant in tenants)
    descriptors = [os.open(first / "allow", os.O_RDWR), os.open(first / "vmm_pid", os.O_RDONLY)]
    descriptors += [os.open(second / "allow", os.O_RDONLY), os.open(first, os.O_RDONLY), os.open(CONTROL, os.O_RDONLY)]
    read = os.read(descriptors[0], 100)
    os.chdir(second)
    remove()
    ktap.comment(f"removed with {len(descriptors)} files open, {read!r} read")
    ktap.ok(not CONTROL.exists(), "the module goes while files are open, and its directory with it")
    errors = [fails(lambda d=d: os.pread(d, 100, 0)) for d in descriptors[:3]]
    errors.append(fails(lambda: os.write(descriptors[0], b"no")))
    ktap.equal(errors, [errno.ENODEV] * 4, "they have nothing more to say, nor do they take anything")
    errors = [fails(lambda d=d: os.listdir(d)) for d in descriptors[3:]]
    ktap.comment(f"reading the directories: {errors}")
    for descriptor in descriptors:
        os.close(descriptor)
    os.chdir("/")
    ktap.ok(insert(), "the module comes back")

    # Readers and writers that never rest, reports, and a module that comes and goes.
    stop = threading.Event()
    done = [0, 0]

    def hammer(number: int) -> None:
        while not stop.is_set():
            for path in [PARAMETER, *CONTROL.glob("*/*")]:
                try:
                    if number or path.name != "allow":
                        path.read_text()
                    else:
                        put(path, "all" if path == PARAMETER else "default")
                    done[number] += 1
                except OSError:
                    pass

    threads = [threading.Thread(target=hammer, args=(number,)) for number in (0, 1)]
    for thread in threads:
        thread.start()
    seen = []
    while len(seen) < 12 or min(done) <= 20:
        seen += [tenant.report() for tenant in tenants]
        remove()
        insert()
    stop.set()
    for thread in threads:
        thread.join()
    ktap.equal(seen, [[GIVEN]] * len(seen), "tenants are served between")
    ktap.comment(f"{done} accesses")
    for tenant in tenants:
        tenant.end()


def insertion() -> None:
    """The parameter at insertion: 6 results."""
    for bad in ("allow=sometimes", "allow=uid=x", "allow="):
        taken = insert(bad)
        found = [line for line in log() if f"ksm_bridge: {bad} is no good: " in line]
        ktap.ok(not taken and len(found) >= 1, f"{bad} is refused, with a line that says why", found)
    good = insert("allow=none")
    tenant = Tenant("anonymous")
    ktap.equal((good, tenant.report()), (True, [KEPT]), "allow=none holds from the beginning")
    remove()
    good = insert("allow=none", "allow=uid=0;5,hugetlb")
    ktap.equal((good, PARAMETER.read_text()), (True, "uid=0;5,hugetlb\n"), "of two the last is taken")
    ktap.equal(tenant.report(), [GIVEN], "and holds")
    tenant.end()
    remove()


def main(parts: Sequence[Callable[[], None]]) -> None:
    os.chmod("/dev/kvm", 0o666)
    Path("/proc/sys/vm/nr_hugepages").write_text("16")
    for name in ("alpha", "alpha/inner", "alphabet"):
        (CGROUPS / name).mkdir()
    subprocess.run(["insmod", MODULES / "kvm_dlh.ko"], check=True)
    insert()
    for part in parts:
        part()
        put(PARAMETER, "all")
    remove()
    insertion()
    subprocess.run(["rmmod", "kvm_dlh"], check=True)
    ktap.done()


ktap.plan(6 + 2 * len(BAD) + 4 + 15 + 13 + 4 + 6)
main((default, bad_values, users_and_cgroups, each_vm, open_files))
