"""Which system calls generated code may make, as a program of the kernel's filter (seccomp, classic BPF).

Ordinary work of Python (memory, time, threads, files that are there) is allowed. A call that starts a process, opens a
socket or reaches for another process or the system ends the process, so that it can be counted. Any other call, also
one that a future kernel brings, answers that it does not exist.
"""

import struct

# NAME:NUMBER ON x86_64:NUMBER ON aarch64, "-" where an architecture has no such call.
ALLOWED = """
read:0:63 write:1:64 readv:19:65 writev:20:66 pread64:17:67 pwrite64:18:68 open:2:- openat:257:56 close:3:57
close_range:436:436 lseek:8:62 stat:4:- fstat:5:80 lstat:6:- newfstatat:262:79 statx:332:291 access:21:-
faccessat:269:48 faccessat2:439:439 readlink:89:- readlinkat:267:78 getdents:78:- getdents64:217:61 getcwd:79:17
chdir:80:49 fchdir:81:50 mkdir:83:- mkdirat:258:34 rmdir:84:- unlink:87:- unlinkat:263:35 rename:82:-
renameat:264:38 renameat2:316:276 truncate:76:45 ftruncate:77:46 fsync:74:82 fdatasync:75:83 dup:32:23 dup2:33:-
dup3:292:24 fcntl:72:25 flock:73:32 ioctl:16:29 pipe:22:- pipe2:293:59 poll:7:- ppoll:271:73 select:23:-
pselect6:270:72 epoll_create:213:- epoll_create1:291:20 epoll_ctl:233:21 epoll_wait:232:- epoll_pwait:281:22
eventfd2:290:19 socketpair:53:199 sendto:44:206 recvfrom:45:207 shutdown:48:210 getsockname:51:204 getsockopt:55:209
mmap:9:222 mprotect:10:226 munmap:11:215 mremap:25:216 madvise:28:233 brk:12:214 futex:202:98 set_robust_list:273:99
get_robust_list:274:100 rseq:334:293 set_tid_address:218:96 exit:60:93 exit_group:231:94 arch_prctl:158:-
sched_yield:24:124 sched_getaffinity:204:123 getcpu:309:168 nanosleep:35:101 clock_nanosleep:230:115
clock_gettime:228:113 clock_getres:229:114 gettimeofday:96:169 time:201:- times:100:153 getrusage:98:165
getrandom:318:278 uname:63:160 sysinfo:99:179 getpid:39:172 gettid:186:178 getppid:110:173 getuid:102:174
geteuid:107:175 getgid:104:176 getegid:108:177 getgroups:115:158 getpgrp:111:- getpgid:121:155 getsid:124:156
prlimit64:302:261 getrlimit:97:163 rt_sigaction:13:134 rt_sigprocmask:14:135 rt_sigreturn:15:139
rt_sigpending:127:136 rt_sigtimedwait:128:137 sigaltstack:131:132 pause:34:- alarm:37:- getitimer:36:102
setitimer:38:103 kill:62:129 tkill:200:130 tgkill:234:131 restart_syscall:219:128 umask:95:166 wait4:61:260
waitid:247:95
"""
FORBIDDEN = """
fork:57:- vfork:58:- execve:59:221 execveat:322:281 socket:41:198 connect:42:203 bind:49:200 listen:50:201
accept:43:202 accept4:288:242 ptrace:101:117 process_vm_readv:310:270 process_vm_writev:311:271 mount:165:40
umount2:166:39 pivot_root:155:41 chroot:161:51 unshare:272:97 setns:308:268 bpf:321:280 perf_event_open:298:241
keyctl:250:219 add_key:248:217 request_key:249:218 init_module:175:105 finit_module:313:273 kexec_load:246:104
io_uring_setup:425:425 userfaultfd:323:282 open_by_handle_at:304:265 reboot:169:142
"""
CLONE = "clone:56:220"  # of a thread it is allowed, of a process forbidden

_ARCHITECTURES = {"x86_64": (1, 0xC000003E), "aarch64": (2, 0xC00000B7)}  # place in the table, AUDIT_ARCH_...
_ALLOW, _KILL, _MISSING = 0x7FFF0000, 0x80000000, 0x00050000 | 38  # SECCOMP_RET_ALLOW, _KILL_PROCESS, _ERRNO | ENOSYS
_LOAD, _IF_EQUAL, _IF_BITS, _RETURN = 0x20, 0x15, 0x45, 0x06  # BPF_LD|W|ABS, BPF_JMP|JEQ|K, BPF_JMP|JSET|K, BPF_RET|K
_NUMBER, _ARCHITECTURE, _FIRST_ARGUMENT = 0, 4, 16  # offsets in struct seccomp_data; arguments are little endian
_CLONE_THREAD = 0x10000


def numbers(table: str, machine: str) -> dict[str, int]:
    """The system calls of a table by name, those that the machine has; ValueError for a machine without a column."""
    if machine not in _ARCHITECTURES:
        raise ValueError(f"no system calls are known of {machine!r}, only of {' and '.join(_ARCHITECTURES)}")
    column = _ARCHITECTURES[machine][0]
    rows = [entry.split(":") for entry in table.split()]
    return {row[0]: int(row[column]) for row in rows if row[column] != "-"}


def program(machine: str) -> bytes:
    """The filter as an array of `struct sock_filter`, for a machine as `platform.machine()` names it."""
    (clone,) = numbers(CLONE, machine).values()
    instructions = [
        (_LOAD, 0, 0, _ARCHITECTURE),
        (_IF_EQUAL, 1, 0, _ARCHITECTURES[machine][1]),
        (_RETURN, 0, 0, _KILL),  # a call in the way of another architecture has other numbers
        (_LOAD, 0, 0, _NUMBER),
        (_IF_EQUAL, 0, 4, clone),
        (_LOAD, 0, 0, _FIRST_ARGUMENT),
        (_IF_BITS, 0, 1, _CLONE_THREAD),
        (_RETURN, 0, 0, _ALLOW),
        (_RETURN, 0, 0, _KILL),
    ]
    for table, action in ((ALLOWED, _ALLOW), (FORBIDDEN, _KILL)):
        for number in numbers(table, machine).values():
            instructions += [(_IF_EQUAL, 0, 1, number), (_RETURN, 0, 0, action)]
    instructions.append((_RETURN, 0, 0, _MISSING))
    return b"".join(struct.pack("HBBI", *instruction) for instruction in instructions)
