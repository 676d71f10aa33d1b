"""The room of a program where bubblewrap does not build it: namespaces, a root folder, and no rights left."""

import ctypes
import os
import struct
import sys
from typing import Any

from gspo_dist.sandbox.guest.calls import (
    CLONE_NEWIPC,
    CLONE_NEWNET,
    CLONE_NEWNS,
    CLONE_NEWPID,
    CLONE_NEWUSER,
    CLONE_NEWUTS,
    PIVOT_ROOT,
    PR_CAPBSET_DROP,
    PR_SET_DUMPABLE,
    PR_SET_NO_NEW_PRIVS,
    PR_SET_PDEATHSIG,
    Refused,
    check,
    column,
    libc,
)

NOBODY = 65534
SIGKILL = 9
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REMOUNT, MS_BIND = 1, 2, 4, 8, 32, 4096
MS_REC, MS_PRIVATE, MNT_DETACH = 16384, 1 << 18, 2
KEPT_FLAGS = 1024 | 2048 | 1 << 21
"""noatime, nodiratime, relatime: what the host has set may not be dropped in a user namespace."""
BASES = ("/mnt", "/media", "/srv", "/tmp")
"""Folders over which the room can be mounted, in a mount namespace of its own."""


def build_room(setup: dict[str, Any], limits: dict[str, Any]) -> None:
    """Namespaces of its own, a root folder of its own, no rights. Returns in process 1 of the namespace.

    Raises Refused where the host does not allow it.
    """
    root, user, group = os.geteuid() == 0, os.geteuid(), os.getegid()
    flags = CLONE_NEWNS | CLONE_NEWPID | CLONE_NEWNET | CLONE_NEWIPC | CLONE_NEWUTS
    check(libc.unshare(flags if root else flags | CLONE_NEWUSER), "unshare")
    if not root:
        map_ids(user, group)
    child = os.fork()
    if child:  # the namespace of processes begins with the child
        os.closerange(0, 256)
        os._exit(0 if os.waitpid(child, 0)[1] == 0 else 1)
    mount(None, "/", None, MS_REC | MS_PRIVATE)
    base = base_of(setup)
    mount("tmpfs", base, "tmpfs", MS_NOSUID | MS_NODEV, "size=1m,mode=755")
    furnish(base, setup, limits)
    check(libc.syscall(PIVOT_ROOT[column()], base.encode(), (base + "/old").encode()), "pivot_root")
    os.chdir("/")
    check(libc.umount2(b"/old", MNT_DETACH), "umount")
    os.rmdir("/old")
    mount(None, "/", None, MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID | MS_NODEV)
    os.chdir("/work")
    libc.sethostname(b"sandbox", 7)
    move_python(setup)
    drop_rights(root)
    libc.prctl(PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0)  # only now: a change of rights clears it


def base_of(setup: dict[str, Any]) -> str:
    for base in BASES:
        if os.path.isdir(base) and not any(source.startswith(base) for source, _ in setup["binds"]):
            return base
    raise Refused(f"no folder to build the room on: one of {', '.join(BASES)} must exist")


def furnish(base: str, setup: dict[str, Any], limits: dict[str, Any]) -> None:
    """The folders of the room: libraries read-only, /proc of its own processes, /work in memory."""
    for source, target in setup["binds"]:
        bind(source, base + target)
    for target, link in setup["links"]:
        os.symlink(target, base + link)
    for folder in ("/proc", "/work", "/old"):
        os.mkdir(base + folder)
    hidden = MS_NOSUID | MS_NODEV | MS_NOEXEC
    try:
        mount("proc", base + "/proc", "proc", hidden, "subset=pid")
    except Refused:  # before Linux 5.8
        mount("proc", base + "/proc", "proc", hidden)
    size = f"size={limits['files_mb']}m,nr_inodes={limits['files']},mode=777"
    mount("tmpfs", base + "/work", "tmpfs", MS_NOSUID | MS_NODEV, size)
    os.symlink("work", base + "/tmp")


def mount(source: str | None, target: str, kind: str | None, flags: int, data: str | None = None) -> None:
    texts = [None if text is None else text.encode() for text in (source, target, kind, data)]
    result = libc.mount(texts[0], texts[1], texts[2], ctypes.c_ulong(flags), texts[3])
    check(result, f"mount {source} on {target}")


def bind(source: str, target: str) -> None:
    """`source` at `target`, read-only."""
    if os.path.isdir(source):
        os.makedirs(target, exist_ok=True)
    else:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        write(target, "")
    mount(source, target, None, MS_BIND | MS_REC)
    held = os.statvfs(target).f_flag
    kept = (held & (MS_NOEXEC | KEPT_FLAGS)) | (0 if source.startswith("/dev") else MS_NODEV)
    mount(None, target, None, MS_BIND | MS_REMOUNT | MS_RDONLY | MS_NOSUID | kept)


def write(path: str, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)


def map_ids(user: int, group: int) -> None:
    write("/proc/self/setgroups", "deny")
    write("/proc/self/uid_map", f"{NOBODY} {user} 1")
    write("/proc/self/gid_map", f"{NOBODY} {group} 1")


def move_python(setup: dict[str, Any]) -> None:
    """The interpreter lies at another place now. Later imports must find it there."""
    old, new = setup["python"]
    if old != new:
        packages = [module.__path__ for module in sys.modules.values() if hasattr(module, "__path__")]
        for paths in [sys.path, *packages]:
            paths[:] = [new + path[len(old) :] if path.startswith(old) else path for path in paths]
        sys.path_importer_cache.clear()
        sys.executable = setup["executable"]
        sys.prefix = sys.base_prefix = sys.exec_prefix = sys.base_exec_prefix = new


def drop_rights(root: bool) -> None:
    """No capability, no way back to one; root becomes nobody."""
    if root:
        os.setgroups([])
        for capability in range(64):
            libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0)
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
        libc.prctl(PR_SET_DUMPABLE, 1, 0, 0, 0)  # or /proc/self would belong to root
        # In a user namespace of its own, RLIMIT_NPROC counts the processes of this sandbox alone. Where the
        # host allows no more of them, it counts those of all sandboxes.
        if libc.unshare(CLONE_NEWUSER) == 0:
            map_ids(NOBODY, NOBODY)
    for capability in range(64):
        libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0)
    header, none = struct.pack("II", 0x20080522, 0), bytes(24)
    check(libc.capset(ctypes.c_char_p(header), ctypes.c_char_p(none)), "capset")
    check(libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no_new_privs")
