"""The process in which generated code is run. `sandbox.run` starts it as `python -c SOURCE REPORT_FD`, job on stdin.

It needs nothing but Python's own library, as it sees no other files. The outer process makes the namespaces and the
private mount tree, forks the inner one, and says how that ended. The inner one gives up every privilege and then runs
code and tests. Lines of the report begin with the job's token.
"""

import ctypes
import errno
import json
import os
import resource
import signal
import sys

NEW_MOUNTS, NEW_HOSTNAME, NEW_IPC, NEW_USER, NEW_PROCESSES, NEW_NETWORK = (
    0x00020000, 0x04000000, 0x08000000, 0x10000000, 0x20000000, 0x40000000,
)  # CLONE_NEW... of Linux  # fmt: skip
READ_ONLY, NO_SETUID, NO_DEVICES, NO_EXEC, REMOUNT, BIND, RECURSIVE, PRIVATE = 1, 2, 4, 8, 32, 4096, 16384, 1 << 18
DETACH = 2  # MNT_DETACH
DIES_WITH_PARENT, SET_DUMPABLE, SET_SECCOMP, NO_NEW_PRIVILEGES, FILTER = 1, 4, 22, 38, 2
CAPABILITY_VERSION = 0x20080522
NOBODY = 65534
NEW_ROOT = "/proc"  # where the private tree is mounted: no library lies below it, and it is there on every Linux
SHARED_LIBRARIES = ("/lib", "/lib64", "/usr/lib", "/usr/lib64")
REFUSED = (errno.EPERM, errno.EACCES, errno.ENOENT, errno.EROFS, errno.ENOSYS)
USER_NAMESPACES = (
    "namespaces are not allowed here (see the settings user.max_user_namespaces, kernel.unprivileged_userns_clone and "
    "kernel.apparmor_restrict_unprivileged_userns of sysctl; a container needs --security-opt seccomp=unconfined)"
)

libc = ctypes.CDLL(None, use_errno=True)


class Missing(Exception):
    """The kernel lacks or refuses something that the sandbox is made of."""


def call(function, *arguments, missing: str) -> None:
    """Calls a function of the C library; raises Missing with these words and the name of the error where it fails."""
    if function(*arguments) != 0:
        number = ctypes.get_errno()
        # Of namespaces this error is no full disk, which a run would take it for.
        reason = "none may be made" if number == errno.ENOSPC else errno.errorcode.get(number, "no reason is known")
        raise Missing(f"{missing} ({reason})")


def enter_namespaces() -> None:
    """Leaves the host's mounts, processes, network, shared memory and name. A user who is not root needs a user
    namespace for that, in which they have every capability over the new ones and none over the host."""
    flags = NEW_MOUNTS | NEW_HOSTNAME | NEW_IPC | NEW_PROCESSES | NEW_NETWORK
    user, group = os.geteuid(), os.getegid()
    if user == 0 and libc.unshare(flags) == 0:
        return
    call(libc.unshare, flags | NEW_USER, missing=USER_NAMESPACES)
    for name, text in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
        try:
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)
        except OSError as error:
            raise Missing(f"{USER_NAMESPACES} ({error.strerror} at {name})") from None


def mount(source, target: str, kind, flags: int, options: str = "") -> None:
    source, kind = (text.encode() if text else None for text in (source, kind))
    call(libc.mount, source, target.encode(), kind, flags, options.encode(),
         missing=f"mounting {target} is not allowed; {USER_NAMESPACES}")  # fmt: skip


def enter_private_tree(size: int) -> None:
    """A root of memory, `size` bytes, that holds an empty /tmp and, read-only, the libraries of Python and of C."""
    python = os.path.dirname(os.path.dirname(os.__file__))  # holds python3.X with its modules and, with some, its .so
    folders = [path for path in (python, *SHARED_LIBRARIES) if os.path.isdir(path)]
    mount(None, "/", None, RECURSIVE | PRIVATE)
    mount("tmpfs", NEW_ROOT, "tmpfs", NO_SETUID | NO_DEVICES, f"size={size},nr_inodes=10000,mode=755")
    for path in sorted(set(folders), key=len):
        target = NEW_ROOT + path
        os.makedirs(target, exist_ok=True)
        if os.listdir(target):
            continue  # it lies in one that is mounted already
        mount(path, target, None, BIND | RECURSIVE)
        kept = os.statvfs(target).f_flag & (NO_SETUID | NO_DEVICES | NO_EXEC)
        mount(None, target, None, BIND | REMOUNT | READ_ONLY | NO_SETUID | NO_DEVICES | kept)
    os.mkdir(f"{NEW_ROOT}/tmp")
    os.chmod(f"{NEW_ROOT}/tmp", 0o1777)
    os.chdir(NEW_ROOT)
    pivot_root = {"x86_64": 155, "aarch64": 41}[os.uname().machine]
    call(libc.syscall, pivot_root, b".", b".", missing="changing the root is not allowed")
    call(libc.umount2, b".", DETACH, missing="leaving the host's files is not allowed")
    os.chdir("/tmp")
    libc.sethostname(b"sandbox", 7)


def limit(job: dict) -> None:
    """Bounds of the inner process: bytes, seconds of a processor, threads."""
    seconds = int(job["seconds"]) + 2  # the clock of `sandbox.run` is the exact one; this one also counts threads
    for kind, most in (
        (resource.RLIMIT_AS, job["memory"]),
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_FSIZE, job["disk"]),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_NPROC, 256),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_MEMLOCK, 0),
        (resource.RLIMIT_MSGQUEUE, 0),
    ):
        hard = resource.getrlimit(kind)[1]
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(kind, (most, most))


def give_up_privileges(job: dict) -> None:
    """Nobody's identity where the process is root, no capability, and only the system calls of the filter."""
    if os.geteuid() == 0:
        try:
            os.setgroups([])
            os.setresgid(NOBODY, NOBODY, NOBODY)
            os.setresuid(NOBODY, NOBODY, NOBODY)
        except OSError:  # a root that is the only user of its namespace; its capabilities go below
            pass
    header, nothing = (ctypes.c_uint32 * 2)(CAPABILITY_VERSION, 0), (ctypes.c_uint32 * 6)()
    call(libc.capset, header, nothing, missing="capabilities cannot be given up")
    call(libc.prctl, DIES_WITH_PARENT, signal.SIGKILL, 0, 0, 0, missing="prctl fails")
    call(libc.prctl, SET_DUMPABLE, 0, 0, 0, 0, missing="prctl fails")  # a crash wakes no handler of the host
    call(libc.prctl, NO_NEW_PRIVILEGES, 1, 0, 0, 0, missing="no_new_privs is not there")

    class Program(ctypes.Structure):
        _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_void_p))

    instructions = bytes.fromhex(job["filter"])
    memory = ctypes.create_string_buffer(instructions, len(instructions))
    program = Program(len(instructions) // 8, ctypes.addressof(memory))
    call(libc.prctl, SET_SECCOMP, FILTER, ctypes.byref(program), 0, 0, missing="filters of seccomp are not there")


def kind_of(error: BaseException) -> str:
    """What is counted where an exception ends code."""
    if isinstance(error, MemoryError):
        return "out_of_memory"
    if isinstance(error, SystemExit):
        return "ended"
    return "forbidden" if isinstance(error, OSError) and error.errno in REFUSED else "raised"


def judge(job: dict, report: int) -> None:
    """Runs the code, then each test in its names; says which counted tests ended without an exception.

    What is used after the code has run is bound before it runs, so that it cannot be replaced by a name of a module.
    """
    token, write, run, leave, kinds = job["token"], os.write, exec, os._exit, kind_of
    tests = [(compile(source, "tests", "exec"), number) for source, number in job["tests"]]
    module = sys.modules["solution"] = type(sys)("solution")  # dataclasses look their module up there
    names = vars(module)

    def say(words: str) -> None:
        write(report, f"\n{token} {words}\n".encode())

    say("begun")
    try:
        run(compile(job["code"], "solution", "exec"), names)
    except BaseException as error:
        say(kinds(error))
        leave(0)
    for test, number in tests:
        try:
            run(test, names)
        except AssertionError:
            continue
        except BaseException as error:
            if kinds(error) != "raised":
                say(kinds(error))
            continue
        if number is not None:
            say(f"passed {number}")
    say("done")
    leave(0)


def main() -> None:
    """Runs the job on stdin; the report goes to the descriptor that the command line names."""
    job, report = json.load(sys.stdin), int(sys.argv[1])
    libc.prctl(DIES_WITH_PARENT, signal.SIGKILL, 0, 0, 0)
    nothing = os.open(os.devnull, os.O_RDWR)
    try:
        enter_namespaces()
        enter_private_tree(job["disk"])
        child = os.fork()
    except Missing as error:
        words = f"refused {error}"
    except OSError as error:
        words = f"refused {error}"
    else:
        if child == 0:
            for standard in (0, 1, 2):
                os.dup2(nothing, standard)
            os.closerange(3, report)
            os.closerange(report + 1, 256)
            try:
                limit(job)
                give_up_privileges(job)
                judge(job, report)
            except Missing as error:
                os.write(report, f"\n{job['token']} refused {error}\n".encode())
            os._exit(1)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        words = f"exit {status}"
    os.write(report, f"\n{job['token']} {words}\n".encode())


if __name__ == "__main__":
    main()
