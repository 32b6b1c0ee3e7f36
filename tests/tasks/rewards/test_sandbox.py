"""Generated code that tries to break out, each in a real sandbox: what it reached, and how the verdict counts it."""

import json
import os
import pathlib
import platform
import shutil
import socket
import subprocess
import sys
import tempfile
import time

import pytest

from mara_jax.tasks.base import TaskError
from mara_jax.tasks.rewards import sandbox, seccomp

try:
    sandbox.check()
    MISSING = ""
except TaskError as refusal:
    MISSING = str(refusal)
made = pytest.mark.skipif(bool(MISSING), reason=MISSING)
LIMITS = sandbox.Limits(seconds=20.0, memory=256 << 20, disk=4 << 20)
SHORT = LIMITS._replace(seconds=0.4)  # for what does not end
TESTS = [("assert f(1) == 2", True), ("assert f(2) == 3", True)]
GOOD = "\ndef f(x): return x + 1"

# Code, the tests that pass, the outcome.
PROGRAMS = {
    "good": (GOOD, 2, "passed"),
    "half good": ("def f(x): return 2 * x", 1, "failed"),
    "no code": ("", 0, "failed"),
    "no Python": ("def f(x: return", 0, "raised"),
    "exits before the tests": ("import sys; sys.exit(0)", 0, "ended"),
    "leaves before the tests": ("import os; os._exit(0)", 0, "ended"),
    "exits in a test": ("def f(x):\n    if x == 2: raise SystemExit(0)\n    return x + 1", 1, "ended"),
    "leaves in a test": ("import os\ndef f(x):\n    if x == 2: os._exit(0)\n    return x + 1", 1, "ended"),
    "says that it passed": ("print('\\npassed 0\\npassed 1\\ndone')\ndef f(x): return 0", 0, "failed"),
    "writes that it passed": (
        "import os\nfor n in range(64):\n    try: os.write(n, b'\\npassed 0\\npassed 1\\ndone\\n')\n"
        "    except OSError: pass\ndef f(x): return 0", 0, "failed",
    ),
    "replaces functions": (
        "import builtins, os\nbuiltins.exec = builtins.compile = builtins.len = lambda *_: 1\n"
        "builtins.AssertionError = BaseException\nos.write = os._exit = lambda *_: 0\ndef f(x): return 0", 0, "failed",
    ),
    "forks": ("import os\nwhile True: os.fork()" + GOOD, 0, "forbidden"),
    "starts programs": ("import subprocess\nsubprocess.run(['true'])" + GOOD, 0, "forbidden"),
    "threads without end": (
        "import threading, time\nwhile True: threading.Thread(target=time.sleep, args=(9,)).start()", 0, "raised",
    ),
    "fills memory": ("rows = []\nwhile True: rows.append(bytearray(1 << 20))" + GOOD, 0, "out_of_memory"),
    "asks for memory": ("row = bytearray(1 << 40)" + GOOD, 0, "out_of_memory"),
    "opens a socket": ("import socket; socket.create_connection(('127.0.0.1', 1))" + GOOD, 0, "forbidden"),
    "reads /etc/passwd": ("open('/etc/passwd').read()" + GOOD, 0, "forbidden"),
    "reads processes": ("open('/proc/1/environ').read()" + GOOD, 0, "forbidden"),
    "changes Python": ("import os; open(os.__file__, 'a').write('#')" + GOOD, 0, "forbidden"),
    "becomes root": ("import os; os.setuid(0)" + GOOD, 0, "forbidden"),
    "prints gigabytes": ("while True: print('x' * (1 << 20))", 0, "out_of_time"),
    "never ends": ("while True: pass", 0, "out_of_time"),
    "sleeps": ("import time; time.sleep(99)", 0, "out_of_time"),
    "hangs in a test": ("def f(x):\n    while x == 2: pass\n    return x + 1", 1, "out_of_time"),
    "crashes": ("import ctypes; ctypes.string_at(0)", 0, "ended"),
    "crashes in a test": ("import ctypes\ndef f(x): return x + 1 if x == 1 else ctypes.string_at(0)", 1, "ended"),
    "aborts": ("import os; os.abort()", 0, "ended"),
    "recurses": ("def g(): g()\ng()", 0, "raised"),
    "traces": ("import ctypes; ctypes.CDLL(None).ptrace(0, 0, 0, 0)" + GOOD, 0, "forbidden"),
    "mounts": ("import ctypes; ctypes.CDLL(None).mount(0, 0, 0, 0, 0)" + GOOD, 0, "forbidden"),
    "makes namespaces": ("import ctypes; ctypes.CDLL(None).unshare(0x10000000)" + GOOD, 0, "forbidden"),
    "unknown calls": (
        "import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\n"
        "assert [libc.syscall(n, 0, 0) for n in (435, 999)] == [-1, -1] and ctypes.get_errno() == 38" + GOOD,
        2, "passed",
    ),
    "honest work": (
        "from __future__ import annotations\nimport asyncio, collections, dataclasses, decimal, heapq, json, re\n"
        "import lzma, sqlite3, ssl, tempfile, threading\n@dataclasses.dataclass\nclass Row:\n    number: int\n"
        "async def one(): await asyncio.sleep(0); return 1\nadded = asyncio.run(one())\n"
        "thread = threading.Thread(target=print); thread.start(); thread.join()\n"
        "with tempfile.TemporaryFile() as file: file.write(b'x')\n"
        "def f(x): return Row(x).number + added", 2, "passed",
    ),
}  # fmt: skip


AS_NOBODY = (
    "good", "leaves before the tests", "forks", "threads without end", "asks for memory", "opens a socket",
    "reads /etc/passwd", "changes Python", "becomes root", "makes namespaces", "honest work",
)  # fmt: skip


def leftovers() -> list[str]:
    """Processes of sandboxes: they have the jail's source as an argument."""
    found = []
    for path in pathlib.Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if b"def enter_private_tree" in path.read_bytes():
                found.append(path.parent.name)
        except OSError:
            continue
    return found


@made
@pytest.mark.parametrize("name", PROGRAMS)
def test_what_code_does_is_contained_and_counted(name):
    code, passed, outcome = PROGRAMS[name]
    verdict = sandbox.run(code, TESTS, SHORT if outcome == "out_of_time" else LIMITS)
    assert (sum(verdict.passed), verdict.outcome) == (passed, outcome)


@pytest.fixture
def folder():
    """One that everybody may read and write, unlike those of pytest."""
    path = pathlib.Path(tempfile.mkdtemp())
    path.chmod(0o777)
    yield path
    shutil.rmtree(path)


@made
def test_nothing_outside_is_reached(folder):
    """A file, a folder, a server and a process that are really there, and that the code knows of."""
    (folder / "secret").write_text("secret")
    victim = subprocess.Popen(["sleep", "60"])
    home = os.path.expanduser("~")  # Python itself may lie in it
    attacks = f"""
import ctypes, os, signal

def attempt(attack):
    try:
        return attack()
    except OSError:
        return "refused"

seen = {{
    "read": attempt(lambda: open({str(folder / "secret")!r}).read()),
    "read from above": attempt(lambda: open("/..{folder / "secret"}").read()),
    "list": attempt(lambda: os.listdir({str(folder)!r})),
    "write": attempt(lambda: open({str(folder / "new")!r}, "w").write("x")),
    "home": attempt(lambda: os.listdir({home!r})) in ("refused", {[os.path.relpath(os.__file__, home).split("/")[0]]}),
    "kill": attempt(lambda: os.kill({victim.pid}, signal.SIGKILL)),
    "kill all": attempt(lambda: os.kill(-1, signal.SIGKILL)),
    "name": os.uname().nodename,
    "process": (os.getpid(), os.getppid()),
    "environment": [name for name in os.environ if name not in ("PYTHONHASHSEED", "LC_CTYPE")],
    "descriptors": [n for n in range(64) if attempt(lambda: os.fstat(n)) != "refused"],
}}
"""
    expected = {
        "read": "refused", "read from above": "refused", "list": "refused", "write": "refused", "home": True,
        "kill": "refused", "kill all": "refused", "name": "sandbox", "process": (1, 0), "environment": [],
    }  # fmt: skip
    tests = [(f"assert seen[{name!r}] == {value!r}", True) for name, value in expected.items()]
    tests.append(("assert len(seen['descriptors']) == 4", True))  # null thrice, and the report
    try:
        verdict = sandbox.run(attacks, tests, LIMITS)
        assert verdict.outcome == "passed", [test for test, ok in zip(tests, verdict.passed, strict=True) if not ok]
        assert victim.poll() is None
    finally:
        victim.kill()
        victim.wait()
    assert not (folder / "new").exists() and (folder / "secret").read_text() == "secret"


@made
def test_nobody_is_called_from_inside():
    """A server of this machine hears nothing of code that connects to it."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        port = server.getsockname()[1]
        code = f"import socket\nsocket.create_connection(('127.0.0.1', {port}), timeout=.5).send(b'x')"
        assert sandbox.run(code, TESTS, LIMITS).outcome == "forbidden"
        with pytest.raises(TimeoutError):
            server.accept()


@made
def test_a_program_that_ran_out_of_time_leaves_no_process():
    started = time.monotonic()
    assert sandbox.run("while True: pass", TESTS, SHORT).outcome == "out_of_time"
    assert time.monotonic() - started < 20
    deadline = time.monotonic() + 10
    while leftovers() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert leftovers() == []


@made
@pytest.mark.skipif(os.geteuid() != 0, reason="only root becomes somebody else")
def test_the_same_holds_for_a_user_who_is_not_root():
    """A user needs a user namespace, which root does not; here `nobody` starts each program."""
    python = next((path for path in ("/usr/bin/python3", "/usr/local/bin/python3") if shutil.which(path)), None)
    if python is None:
        pytest.skip("this machine has no Python that nobody can start")
    program = """
import json, os, sys
from mara_jax.tasks.rewards import sandbox
sandbox.source_of_jail()
programs, tests, limits, sys.executable = json.loads(sys.argv[1])
os.setgroups([]); os.setresgid(65534, 65534, 65534); os.setresuid(65534, 65534, 65534)
try:
    for name, code in programs.items():
        passed, outcome = sandbox.run(code, tests, sandbox.Limits(*limits))
        print(json.dumps([name, sum(passed), outcome]), flush=True)
except sandbox.TaskError as error:
    sys.exit(str(error))
"""
    codes = {name: PROGRAMS[name][0] for name in AS_NOBODY}
    done = subprocess.run(
        [sys.executable, "-c", program, json.dumps([codes, TESTS, LIMITS, python])], capture_output=True, text=True
    )
    if "namespaces are not allowed" in done.stderr:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stderr
    outcomes = {name: (passed, outcome) for name, passed, outcome in map(json.loads, done.stdout.splitlines())}
    assert outcomes == {name: PROGRAMS[name][1:] for name in codes}


@pytest.mark.parametrize(
    ("jail", "words"),
    [
        (
            "raise Missing(USER_NAMESPACES)",
            "the sandbox cannot be made: namespaces are not allowed here (see the settings",
        ),
        ("raise SystemExit('no such module')", "the sandbox for generated code did not start: no such module"),
    ],
)
def test_where_the_kernel_refuses_code_is_refused(monkeypatch, jail, words):
    source = sandbox.source_of_jail().replace("def enter_namespaces() -> None:", f"def enter_namespaces():\n    {jail}")
    monkeypatch.setattr(sandbox, "source_of_jail", lambda: source)
    monkeypatch.setattr(sandbox, "_filter", lambda: "")
    with pytest.raises(TaskError) as caught:
        sandbox.check()
    assert words in str(caught.value) and "\n" not in str(caught.value)


@made
def test_a_filter_that_is_none_is_refused(monkeypatch):
    monkeypatch.setattr(sandbox, "_filter", lambda: "00" * 7)
    with pytest.raises(TaskError, match=r"cannot be made: filters of seccomp are not there \(EINVAL\)"):
        sandbox.check()


def test_other_systems_are_refused(monkeypatch):
    monkeypatch.setattr(sandbox.sys, "platform", "darwin")
    with pytest.raises(TaskError, match=r"only in a sandbox of the Linux kernel, and this system is darwin"):
        sandbox.check()
    monkeypatch.undo()
    with pytest.raises(ValueError, match="no system calls are known of 'sparc', only of x86_64 and aarch64"):
        seccomp.program("sparc")


HEADER = pathlib.Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h")


@pytest.mark.skipif(platform.machine() != "x86_64" or not HEADER.exists(), reason="needs the kernel's headers")
def test_numbers_of_system_calls_are_the_kernels():
    known = dict(line.split()[1:] for line in HEADER.read_text().splitlines() if line.startswith("#define __NR_"))
    for table in (seccomp.ALLOWED, seccomp.FORBIDDEN, seccomp.CLONE):
        for name, number in seccomp.numbers(table, "x86_64").items():
            assert int(known[f"__NR_{name}"]) == number, name
    assert not set(seccomp.numbers(seccomp.ALLOWED, "aarch64")) & set(seccomp.numbers(seccomp.FORBIDDEN, "aarch64"))


NO_NAMESPACES = "echo 0 > /proc/sys/user/max_user_namespaces; exec setpriv --bounding-set=-all --inh-caps=-all "


@made
@pytest.mark.skipif(not shutil.which("unshare") or not shutil.which("setpriv"), reason="needs util-linux")
def test_a_machine_that_allows_no_namespaces_is_refused():
    """In a namespace whose users may make none, as a user without capabilities."""
    program = "from mara_jax.tasks.rewards import sandbox; sandbox.check()"
    shell = f"{NO_NAMESPACES} {sys.executable} -c '{program}'"
    done = subprocess.run(["unshare", "-Ur", "bash", "-c", shell], capture_output=True, text=True)
    if "unshare failed" in done.stderr:
        pytest.skip(done.stderr.strip())
    last = done.stderr.strip().splitlines()[-1]
    assert "TaskError: generated code cannot be run here, as the sandbox cannot be made: namespaces are not" in last
    assert last.endswith("(none may be made)") and "user.max_user_namespaces" in last
