// File system calls that Node lacks, relative to directory descriptors, and the credentials of the calling thread.
// Each function is one system call; those that end in Proc work on what stands behind an O_PATH descriptor, through the
// magic links of a /proc/self/fd directory that was opened at start-up (no /proc need be mounted later).
#include "addon.h"
#include <fcntl.h>
#include <linux/capability.h>
#include <linux/securebits.h>
#include <sched.h>
#include <sys/file.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/statfs.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <sys/xattr.h>
#include <unistd.h>

namespace {

int64_t openAt(Env &e, int32_t dirfd, uint32_t name, int32_t flags, uint32_t mode) {
  return sys(openat(dirfd, e.at(name), flags | O_CLOEXEC, mode));
}

int64_t reopen(Env &, int32_t procfd, int32_t fd, int32_t flags) {
  // O_NOFOLLOW would name the magic link itself.
  return sys(openat(procfd, FdName(fd).start, (flags & ~O_NOFOLLOW) | O_CLOEXEC));
}

int64_t statX(Env &e, int32_t dirfd, uint32_t name, int32_t flags, uint32_t mask, uint32_t out) {
  return sys(statx(dirfd, e.at(name), flags, mask, e.at<struct statx>(out)));
}

// In the layout of statx: half of its 150 ns are for copying a structure of twice the size to us.
int64_t fStat(Env &e, int32_t fd, uint32_t out) {
  struct stat st;
  if (syscall(SYS_fstat, fd, &st) < 0) return -errno; // raw: the C library looks up an empty name instead
  struct statx &to = *e.at<struct statx>(out);
  to.stx_mask = STATX_BASIC_STATS;
  to.stx_blksize = st.st_blksize;
  to.stx_attributes = to.stx_attributes_mask = 0;
  to.stx_nlink = st.st_nlink;
  to.stx_uid = st.st_uid;
  to.stx_gid = st.st_gid;
  to.stx_mode = st.st_mode;
  to.stx_ino = st.st_ino;
  to.stx_size = st.st_size;
  to.stx_blocks = st.st_blocks;
  to.stx_atime = {st.st_atim.tv_sec, static_cast<uint32_t>(st.st_atim.tv_nsec), {}};
  to.stx_mtime = {st.st_mtim.tv_sec, static_cast<uint32_t>(st.st_mtim.tv_nsec), {}};
  to.stx_ctime = {st.st_ctim.tv_sec, static_cast<uint32_t>(st.st_ctim.tv_nsec), {}};
  to.stx_btime = {};
  to.stx_rdev_major = major(st.st_rdev);
  to.stx_rdev_minor = minor(st.st_rdev);
  to.stx_dev_major = major(st.st_dev);
  to.stx_dev_minor = minor(st.st_dev);
  return 0;
}

int64_t mkdirAt(Env &e, int32_t dirfd, uint32_t name, uint32_t mode) { return sys(mkdirat(dirfd, e.at(name), mode)); }

int64_t mknodAt(Env &e, int32_t dirfd, uint32_t name, uint32_t mode, uint32_t rdev) {
  return sys(syscall(SYS_mknodat, dirfd, e.at(name), mode, rdev)); // raw: the argument already has the kernel's encoding
}

int64_t symlinkAt(Env &e, uint32_t target, int32_t dirfd, uint32_t name) { return sys(symlinkat(e.at(target), dirfd, e.at(name))); }

int64_t linkAt(Env &e, int32_t olddirfd, uint32_t oldname, int32_t newdirfd, uint32_t newname, int32_t flags) {
  return sys(linkat(olddirfd, e.at(oldname), newdirfd, e.at(newname), flags));
}

int64_t linkProc(Env &e, int32_t procfd, int32_t fd, int32_t newdirfd, uint32_t newname) {
  return sys(linkat(procfd, FdName(fd).start, newdirfd, e.at(newname), AT_SYMLINK_FOLLOW));
}

int64_t unlinkAt(Env &e, int32_t dirfd, uint32_t name, int32_t flags) { return sys(unlinkat(dirfd, e.at(name), flags)); }

int64_t renameAt2(Env &e, int32_t olddirfd, uint32_t oldname, int32_t newdirfd, uint32_t newname, uint32_t flags) {
  return sys(renameat2(olddirfd, e.at(oldname), newdirfd, e.at(newname), flags));
}

int64_t readlinkAt(Env &e, int32_t dirfd, uint32_t name, uint32_t out, uint32_t size) {
  return sys(readlinkat(dirfd, e.at(name), e.at(out), size));
}

int64_t changeMode(Env &, int32_t fd, uint32_t mode) { return sys(fchmod(fd, mode)); }

int64_t chmodProc(Env &, int32_t procfd, int32_t fd, uint32_t mode) { return sys(fchmodat(procfd, FdName(fd).start, mode, 0)); }

int64_t changeOwnerAt(Env &e, int32_t dirfd, uint32_t name, uint32_t uid, uint32_t gid, int32_t flags) {
  return sys(fchownat(dirfd, e.at(name), uid, gid, flags));
}

int64_t setTimes(Env &e, int32_t fd, uint32_t times) { return sys(futimens(fd, e.at<timespec>(times))); }

int64_t utimensProc(Env &e, int32_t procfd, int32_t fd, uint32_t times) {
  return sys(utimensat(procfd, FdName(fd).start, e.at<timespec>(times), 0));
}

int64_t truncateFd(Env &, int32_t fd, int64_t size) { return sys(ftruncate(fd, size)); }

int64_t allocate(Env &, int32_t fd, int32_t mode, int64_t offset, int64_t length) { return sys(fallocate(fd, mode, offset, length)); }

int64_t statFs(Env &e, int32_t fd, uint32_t out) { return sys(fstatfs(fd, e.at<struct statfs>(out))); }

int64_t getDents(Env &e, int32_t fd, uint32_t out, uint32_t size) { return sys(syscall(SYS_getdents64, fd, e.at(out), size)); }

int64_t seek(Env &, int32_t fd, int64_t offset, int32_t whence) { return sys(lseek(fd, offset, whence)); }

int64_t seekDirectory(Env &, int32_t fd, uint32_t low, uint32_t high) {
  return lseek(fd, static_cast<off_t>(static_cast<uint64_t>(high) << 32 | low), SEEK_SET) < 0 ? -errno : 0;
}

int64_t syncFile(Env &, int32_t fd, int32_t dataOnly) { return sys(dataOnly ? fdatasync(fd) : fsync(fd)); }

int64_t syncFs(Env &, int32_t fd) { return sys(syncfs(fd)); }

int64_t accessProc(Env &, int32_t procfd, int32_t fd, int32_t mode) {
  return sys(syscall(SYS_faccessat2, procfd, FdName(fd).start, mode, AT_EACCESS));
}

int64_t setFlags(Env &, int32_t fd, int32_t flags) { return sys(fcntl(fd, F_SETFL, flags)); }

int64_t fileLock(Env &, int32_t fd, int32_t operation) { return sys(flock(fd, operation)); }

int64_t ofdLock(Env &e, int32_t fd, int32_t command, uint32_t lock) { return sys(fcntl(fd, command, e.at<struct flock>(lock))); }

int64_t control(Env &e, int32_t fd, uint32_t request, uint32_t argument) {
  return sys(ioctl(fd, static_cast<unsigned long>(request), e.at(argument)));
}

int64_t copyFileRange(Env &, int32_t in, int64_t inOffset, int32_t out, int64_t outOffset, int64_t length) {
  loff_t from = inOffset, to = outOffset;
  return sys(copy_file_range(in, &from, out, &to, length, 0));
}

// Working directory and umask belong to a structure that all threads of a process share (CLONE_FS): this thread leaves it
// before it changes either.
bool ownFs() {
  thread_local bool own = false;
  if (!own) own = unshare(CLONE_FS) == 0;
  return own;
}

int64_t setUmask(Env &, uint32_t mask) {
  if (!ownFs()) return -errno;
  return umask(mask);
}

int64_t getXattr(Env &e, int32_t procfd, int32_t fd, uint32_t name, uint32_t value, uint32_t size) {
  if (!enterProcFd(e, procfd)) return -errno;
  return sys(getxattr(FdName(fd).start, e.at(name), e.at(value), size));
}

int64_t setXattr(Env &e, int32_t procfd, int32_t fd, uint32_t name, uint32_t value, uint32_t size, int32_t flags) {
  if (!enterProcFd(e, procfd)) return -errno;
  return sys(setxattr(FdName(fd).start, e.at(name), e.at(value), size, flags));
}

int64_t listXattr(Env &e, int32_t procfd, int32_t fd, uint32_t list, uint32_t size) {
  if (!enterProcFd(e, procfd)) return -errno;
  return sys(listxattr(FdName(fd).start, e.at(list), size));
}

int64_t removeXattr(Env &e, int32_t procfd, int32_t fd, uint32_t name) {
  if (!enterProcFd(e, procfd)) return -errno;
  return sys(removexattr(FdName(fd).start, e.at(name)));
}

// --- credentials: raw system calls, because libc's change every thread of the process ---

int64_t keepCapabilities(Env &) {
  int now = prctl(PR_GET_SECUREBITS);
  if (now < 0) return -errno;
  if (now & SECBIT_NO_SETUID_FIXUP) return 0;
  return sys(prctl(PR_SET_SECUREBITS, now | SECBIT_NO_SETUID_FIXUP));
}

int64_t setEffectiveGid(Env &, uint32_t gid) { return sys(syscall(SYS_setresgid, -1, gid, -1)); }
int64_t setEffectiveUid(Env &, uint32_t uid) { return sys(syscall(SYS_setresuid, -1, uid, -1)); }
int64_t setGroups(Env &e, uint32_t groups, uint32_t count) { return sys(syscall(SYS_setgroups, count, e.at<gid_t>(groups))); }

bool readCaps(__user_cap_data_struct (&data)[2]) {
  __user_cap_header_struct header = {_LINUX_CAPABILITY_VERSION_3, 0};
  return syscall(SYS_capget, &header, data) == 0;
}

// Sets one bit of the effective set; true when that changed it.
bool changeCap(uint32_t cap, bool on) {
  __user_cap_header_struct header = {_LINUX_CAPABILITY_VERSION_3, 0};
  __user_cap_data_struct data[2];
  if (!readCaps(data)) return false;
  uint32_t bit = 1u << (cap & 31), &word = data[cap >> 5].effective;
  errno = 0;
  if (((word & bit) != 0) == on) return false;
  word ^= bit;
  return syscall(SYS_capset, &header, data) == 0;
}

int64_t hasCapability(Env &, uint32_t cap) {
  __user_cap_data_struct data[2];
  if (cap > 63 || !readCaps(data)) return 0;
  return (data[cap >> 5].effective >> (cap & 31)) & 1;
}

int64_t setCapability(Env &, uint32_t cap, int32_t on) {
  if (cap > 63) return -EINVAL;
  if (changeCap(cap, on != 0)) return 1;
  return -errno;
}

} // namespace

// There are no *at calls for extended attributes before Linux 6.13 and none for inotify, and the f… ones refuse O_PATH: so the
// thread's working directory is /proc/self/fd, and "N" is a path.
bool enterProcFd(Env &e, int32_t procfd) {
  if (!e.inProcFd) e.inProcFd = ownFs() && fchdir(procfd) == 0;
  return e.inProcFd;
}

bool dropFsetid() { return changeCap(CAP_FSETID, false); }
void raiseFsetid() { changeCap(CAP_FSETID, true); }

void initFsops(napi_env env, napi_value exports, Env *data) {
  add<&openAt>(env, exports, data, "openat");
  add<&reopen>(env, exports, data, "reopen");
  add<&statX>(env, exports, data, "statx");
  add<&fStat>(env, exports, data, "fstat");
  add<&mkdirAt>(env, exports, data, "mkdirat");
  add<&mknodAt>(env, exports, data, "mknodat");
  add<&symlinkAt>(env, exports, data, "symlinkat");
  add<&linkAt>(env, exports, data, "linkat");
  add<&linkProc>(env, exports, data, "linkProc");
  add<&unlinkAt>(env, exports, data, "unlinkat");
  add<&renameAt2>(env, exports, data, "renameat2");
  add<&readlinkAt>(env, exports, data, "readlinkat");
  add<&changeMode>(env, exports, data, "fchmod");
  add<&chmodProc>(env, exports, data, "chmodProc");
  add<&changeOwnerAt>(env, exports, data, "fchownat");
  add<&setTimes>(env, exports, data, "futimens");
  add<&utimensProc>(env, exports, data, "utimensProc");
  add<&truncateFd>(env, exports, data, "ftruncate");
  add<&allocate>(env, exports, data, "fallocate");
  add<&statFs>(env, exports, data, "fstatfs");
  add<&getDents>(env, exports, data, "getdents64");
  add<&seek>(env, exports, data, "lseek");
  add<&seekDirectory>(env, exports, data, "seekDirectory");
  add<&syncFile>(env, exports, data, "fsync");
  add<&syncFs>(env, exports, data, "syncfs");
  add<&accessProc>(env, exports, data, "accessProc");
  add<&setFlags>(env, exports, data, "setFlags");
  add<&fileLock>(env, exports, data, "flock");
  add<&ofdLock>(env, exports, data, "ofdLock");
  add<&control>(env, exports, data, "ioctl");
  add<&copyFileRange>(env, exports, data, "copyFileRange");
  add<&setUmask>(env, exports, data, "umask");
  add<&getXattr>(env, exports, data, "getxattr");
  add<&setXattr>(env, exports, data, "setxattr");
  add<&listXattr>(env, exports, data, "listxattr");
  add<&removeXattr>(env, exports, data, "removexattr");
  add<&keepCapabilities>(env, exports, data, "keepCapabilities");
  add<&setEffectiveGid>(env, exports, data, "setEffectiveGid");
  add<&setEffectiveUid>(env, exports, data, "setEffectiveUid");
  add<&setGroups>(env, exports, data, "setGroups");
  add<&hasCapability>(env, exports, data, "hasCapability");
  add<&setCapability>(env, exports, data, "setCapability");
}
