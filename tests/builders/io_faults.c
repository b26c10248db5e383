/* Loaded before libc: the k-th call of a kind on a path below a folder fails with an error of choice, once or from then
   on. Python, safetensors (Rust) and TensorBoard all pass through here. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum { WRITE = 1, OPEN = 2, READ = 4, RENAME = 8, SYNC = 16, MKDIR = 32 };

static char below[4096];
static int kinds, error_number, goes_on;
static long left;
static volatile long seen;

/* Everything passes until this is called; `k` 0 only counts. */
void io_faults_arm(const char *folder, int which, long k, int number, int sticky) {
  kinds = which, error_number = number, goes_on = sticky, left = k, seen = 0;
  strncpy(below, folder, sizeof below - 1);
}

long io_faults_seen(void) { return seen; }

static int fails(int kind, const char *path) {
  if (!below[0] || !(kinds & kind) || !path || strncmp(path, below, strlen(below))) return 0;
  long now = __sync_add_and_fetch(&seen, 1);
  if (!left || now < left || (now > left && !goes_on)) return 0;
  errno = error_number;
  return 1;
}

static int fd_fails(int kind, int fd) {
  if (!below[0] || !(kinds & kind)) return 0;
  char link[64], path[4096];
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  ssize_t size = readlink(link, path, sizeof path - 1);
  if (size < 0) return 0;
  path[size] = 0;
  return fails(kind, path);
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define OPENS(flags) ((flags) & (O_CREAT | O_WRONLY | O_RDWR) ? OPEN : READ)
#define MODE(flags, last)                    \
  mode_t mode = 0;                           \
  if ((flags) & (O_CREAT | O_TMPFILE)) {     \
    va_list list;                            \
    va_start(list, last);                    \
    mode = va_arg(list, mode_t);             \
    va_end(list);                            \
  }

int open(const char *path, int flags, ...) {
  MODE(flags, flags)
  return fails(OPENS(flags), path) ? -1 : REAL(open)(path, flags, mode);
}
int open64(const char *path, int flags, ...) {
  MODE(flags, flags)
  return fails(OPENS(flags), path) ? -1 : REAL(open64)(path, flags, mode);
}
int openat(int at, const char *path, int flags, ...) {
  MODE(flags, flags)
  return fails(OPENS(flags), path) ? -1 : REAL(openat)(at, path, flags, mode);
}
int openat64(int at, const char *path, int flags, ...) {
  MODE(flags, flags)
  return fails(OPENS(flags), path) ? -1 : REAL(openat64)(at, path, flags, mode);
}
ssize_t write(int fd, const void *data, size_t size) { return fd_fails(WRITE, fd) ? -1 : REAL(write)(fd, data, size); }
ssize_t pwrite(int fd, const void *data, size_t size, off_t at) {
  return fd_fails(WRITE, fd) ? -1 : REAL(pwrite)(fd, data, size, at);
}
ssize_t pwrite64(int fd, const void *data, size_t size, off64_t at) {
  return fd_fails(WRITE, fd) ? -1 : REAL(pwrite64)(fd, data, size, at);
}
ssize_t writev(int fd, const struct iovec *parts, int count) {
  return fd_fails(WRITE, fd) ? -1 : REAL(writev)(fd, parts, count);
}
int ftruncate(int fd, off_t size) { return fd_fails(WRITE, fd) ? -1 : REAL(ftruncate)(fd, size); }
int ftruncate64(int fd, off64_t size) { return fd_fails(WRITE, fd) ? -1 : REAL(ftruncate64)(fd, size); }
int fsync(int fd) { return fd_fails(SYNC, fd) ? -1 : REAL(fsync)(fd); }
int fdatasync(int fd) { return fd_fails(SYNC, fd) ? -1 : REAL(fdatasync)(fd); }
int rename(const char *from, const char *to) { return fails(RENAME, to) ? -1 : REAL(rename)(from, to); }
int renameat(int at, const char *from, int to_at, const char *to) {
  return fails(RENAME, to) ? -1 : REAL(renameat)(at, from, to_at, to);
}
int mkdir(const char *path, mode_t mode) { return fails(MKDIR, path) ? -1 : REAL(mkdir)(path, mode); }
int mkdirat(int at, const char *path, mode_t mode) { return fails(MKDIR, path) ? -1 : REAL(mkdirat)(at, path, mode); }
