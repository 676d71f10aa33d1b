"""System calls of Linux: those that the guest makes, and the filter of those that a program may not make."""

import ctypes
import os
import struct

CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC = 0x20000, 0x4000000, 0x8000000
CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000
ALL_NAMESPACES = 0x7E020000  # those, and CLONE_NEWCGROUP
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_CAPBSET_DROP, PR_SET_CHILD_SUBREAPER = 1, 4, 24, 36
PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 22, 38
libc = ctypes.CDLL(None, use_errno=True)

# Numbers of system calls on (x86_64, aarch64); None where a machine has no such call.
DENIED: dict[str, tuple[int, int | None]] = {
    "ptrace": (101, 117), "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41),
    "chroot": (161, 51), "swapon": (167, 224), "swapoff": (168, 225), "reboot": (169, 142),
    "sethostname": (170, 161), "setdomainname": (171, 162), "acct": (163, 89), "settimeofday": (164, 170),
    "clock_settime": (227, 112), "adjtimex": (159, 171), "iopl": (172, None), "ioperm": (173, None),
    "init_module": (175, 105), "delete_module": (176, 106), "finit_module": (313, 273),
    "quotactl": (179, 60), "unshare": (272, 97), "setns": (308, 268), "add_key": (248, 217),
    "request_key": (249, 218), "keyctl": (250, 219), "bpf": (321, 280), "perf_event_open": (298, 241),
    "userfaultfd": (323, 282), "kexec_load": (246, 104), "kexec_file_load": (320, 294),
    "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "kcmp": (312, 272),
    "io_uring_setup": (425, 425), "io_uring_enter": (426, 426), "io_uring_register": (427, 427),
    "name_to_handle_at": (303, 264), "open_by_handle_at": (304, 265), "lookup_dcookie": (212, 18),
    "syslog": (103, 116), "personality": (135, 92), "move_pages": (279, 239), "migrate_pages": (256, 238),
    "fanotify_init": (300, 262), "open_tree": (428, 428), "move_mount": (429, 429), "fsopen": (430, 430),
    "fsconfig": (431, 431), "fsmount": (432, 432), "fspick": (433, 433), "mount_setattr": (442, 442),
    "pidfd_getfd": (438, 438), "process_madvise": (440, 440),
    # Memory that RLIMIT_AS does not see.
    "memfd_create": (319, 279), "memfd_secret": (447, 447), "shmget": (29, 194), "shmat": (30, 196),
    "semget": (64, 190), "msgget": (68, 186), "mq_open": (240, 180),
    # No network, and no socket of a daemon on the host. socketpair stays: asyncio needs it.
    "socket": (41, 198),
}  # fmt: skip
SIGNALS = {"kill": (62, 129), "tkill": (200, 130), "tgkill": (234, 131), "pidfd_send_signal": (424, 424)}
CLONE, CLONE3, PIVOT_ROOT = (56, 220), 435, (155, 41)
MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
ERRNO, ALLOW, KILL = 0x00050000, 0x7FFF0000, 0x80000000
EPERM, ENOSYS = 1, 38

Instruction = tuple[int, int, int, int]


class Refused(Exception):
    """The host does not let us do what a room needs."""


def check(result: int, what: str) -> None:
    """Raises Refused unless a call of libc gave 0."""
    if result != 0:
        raise Refused(f"{what}: {os.strerror(ctypes.get_errno())}")


def column() -> int:
    """Where this machine's numbers stand in the tables."""
    machine = os.uname().machine
    if machine not in MACHINES:
        raise Refused(f"no table of system calls for {machine}; known: {', '.join(MACHINES)}")
    return MACHINES[machine][0]


def filter_program(own_signals_only: bool) -> list[Instruction]:
    """The seccomp filter as BPF instructions: (code, jump if true, jump if false, constant).

    own_signals_only: only to this process. Without a namespace of its own, a program could otherwise end
    the other processes of its user.
    """
    at = column()

    def load(offset: int) -> Instruction:
        return 0x20, 0, 0, offset

    def equal(value: int, if_true: int, if_false: int) -> Instruction:
        return 0x15, if_true, if_false, value

    def end(value: int) -> Instruction:
        return 0x06, 0, 0, value

    program = [load(4), equal(MACHINES[os.uname().machine][1], 1, 0), end(KILL), load(0)]
    if at == 0:  # the x32 calls have numbers of their own: all from 0x40000000 up
        program += [(0x35, 0, 1, 0x40000000), end(ERRNO | EPERM)]
    for numbers in DENIED.values():
        number = numbers[at]
        if number is not None:
            program += [equal(number, 0, 1), end(ERRNO | EPERM)]
    # The flags of clone3 lie in memory, where no filter can read them. libc falls back to clone then.
    program += [equal(CLONE3, 0, 1), end(ERRNO | ENOSYS)]
    any_namespace = (0x45, 0, 1, ALL_NAMESPACES)
    program += [equal(CLONE[at], 0, 4), load(16), any_namespace, end(ERRNO | EPERM), end(ALLOW)]
    for numbers in SIGNALS.values() if own_signals_only else ():
        program += [equal(numbers[at], 0, 4), load(16), equal(os.getpid(), 1, 0)]
        program += [end(ERRNO | EPERM), end(ALLOW)]
    return [*program, end(ALLOW)]


def install_filter(own_signals_only: bool) -> None:
    """For this process and all that it starts, until they end."""
    program = b"".join(struct.pack("HBBI", *one) for one in filter_program(own_signals_only))
    buffer = ctypes.create_string_buffer(program, len(program))
    header = struct.pack("HxxxxxxQ", len(program) // 8, ctypes.addressof(buffer))
    check(libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no_new_privs")
    check(libc.prctl(PR_SET_SECCOMP, 2, ctypes.c_char_p(header), 0, 0), "seccomp")
