// Injects a fault into one file-system call of a process. Preloaded, it counts the calls on paths inside one folder (and on
// relative paths: the tests work in that folder), and at the call of a given number fails, shortens, or kills the process.
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

enum kind { NONE, FAIL, FULL, SHORT, KILL };

static char folder[4096];
static size_t folder_length;
static long target, count;
static enum kind kind;
static char watched[1 << 16];  // by file descriptor

void fault_arm(const char* path, long at, int what) {
  strncpy(folder, path, sizeof folder - 1);
  folder_length = strlen(folder);
  target = at;
  count = 0;
  kind = what;
}

// Returns the calls seen since fault_arm.
long fault_count(void) { return count; }

static int inside(int at, const char* path) {
  if (!kind || !path) return 0;
  if (path[0] == '/') return strncmp(path, folder, folder_length) == 0;
  return at == AT_FDCWD || (at >= 0 && at < (int)sizeof watched && watched[at]);
}

static int is_watched(int fd) { return kind && fd >= 0 && fd < (int)sizeof watched && watched[fd]; }

// Counts a call; returns what shall happen to it.
static enum kind next(int writes) {
  long here = count++;
  if (kind == FULL) return writes && here >= target ? FAIL : NONE;
  return here == target ? kind : NONE;
}

static int failed(int error) {
  errno = error;
  return -1;
}

static void after(enum kind what) {
  if (what == KILL) kill(getpid(), SIGKILL);
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

// A call that returns -1 when it fails.
#define CALL(condition, writes, error, real)           \
  enum kind what = (condition) ? next(writes) : NONE;  \
  if (what == FAIL) return failed(error);              \
  __typeof__(real) result = real;                      \
  after(what);                                         \
  return result;

static int opened(int fd, int at, const char* path) {
  if (fd >= 0 && fd < (int)sizeof watched) watched[fd] = inside(at, path);
  return fd;
}

#define OPEN(name, parameters, at, real)                                        \
  int name parameters {                                                         \
    va_list rest;                                                               \
    va_start(rest, flags);                                                      \
    mode_t mode = flags & O_CREAT ? va_arg(rest, mode_t) : 0;                   \
    va_end(rest);                                                               \
    enum kind what = inside(at, path) ? next((flags & O_CREAT) != 0) : NONE;    \
    if (what == FAIL) return failed(flags & O_CREAT ? ENOSPC : EIO);            \
    int fd = opened(real, at, path);                                            \
    after(what);                                                                \
    return fd;                                                                  \
  }
OPEN(open, (const char* path, int flags, ...), AT_FDCWD, REAL(open)(path, flags, mode))
OPEN(open64, (const char* path, int flags, ...), AT_FDCWD, REAL(open64)(path, flags, mode))
OPEN(openat, (int at, const char* path, int flags, ...), at, REAL(openat)(at, path, flags, mode))
OPEN(openat64, (int at, const char* path, int flags, ...), at, REAL(openat64)(at, path, flags, mode))

ssize_t read(int fd, void* buffer, size_t size) {
  enum kind what = is_watched(fd) ? next(0) : NONE;
  if (what == FAIL) return failed(EIO);
  ssize_t result = REAL(read)(fd, buffer, what == SHORT && size > 1 ? size / 2 : size);
  after(what);
  return result;
}

ssize_t write(int fd, const void* buffer, size_t size) {
  enum kind what = is_watched(fd) ? next(1) : NONE;
  if (what == FAIL) return failed(ENOSPC);
  ssize_t result = REAL(write)(fd, buffer, what == SHORT && size > 1 ? size / 2 : size);
  after(what);
  return result;
}

int close(int fd) {
  int ours = is_watched(fd);
  if (fd >= 0 && fd < (int)sizeof watched) watched[fd] = 0;
  enum kind what = ours ? next(0) : NONE;
  int result = REAL(close)(fd);
  after(what);
  return what == FAIL ? failed(EIO) : result;
}

int fsync(int fd) { CALL(is_watched(fd), 1, EIO, REAL(fsync)(fd)) }
int flock(int fd, int operation) { CALL(is_watched(fd), 0, EIO, REAL(flock)(fd, operation)) }
int fchmod(int fd, mode_t mode) { CALL(is_watched(fd), 0, EIO, REAL(fchmod)(fd, mode)) }
int chmod(const char* path, mode_t mode) { CALL(inside(AT_FDCWD, path), 0, EIO, REAL(chmod)(path, mode)) }
int rename(const char* from, const char* to) { CALL(inside(AT_FDCWD, to), 1, ENOSPC, REAL(rename)(from, to)) }
int renameat2(int at, const char* from, int to_at, const char* to, unsigned flags) {
  CALL(inside(to_at, to), 1, ENOSPC, REAL(renameat2)(at, from, to_at, to, flags))
}
int link(const char* from, const char* to) { CALL(inside(AT_FDCWD, to), 1, ENOSPC, REAL(link)(from, to)) }
int linkat(int at, const char* from, int to_at, const char* to, int flags) {
  CALL(inside(to_at, to), 1, ENOSPC, REAL(linkat)(at, from, to_at, to, flags))
}
int unlink(const char* path) { CALL(inside(AT_FDCWD, path), 0, EIO, REAL(unlink)(path)) }
int unlinkat(int at, const char* path, int flags) { CALL(inside(at, path), 0, EIO, REAL(unlinkat)(at, path, flags)) }
int rmdir(const char* path) { CALL(inside(AT_FDCWD, path), 0, EIO, REAL(rmdir)(path)) }
int mkdir(const char* path, mode_t mode) { CALL(inside(AT_FDCWD, path), 1, ENOSPC, REAL(mkdir)(path, mode)) }
int stat(const char* path, struct stat* found) { CALL(inside(AT_FDCWD, path), 0, EIO, REAL(stat)(path, found)) }
int lstat(const char* path, struct stat* found) { CALL(inside(AT_FDCWD, path), 0, EIO, REAL(lstat)(path, found)) }
int fstat(int fd, struct stat* found) { CALL(is_watched(fd), 0, EIO, REAL(fstat)(fd, found)) }
int stat64(const char* path, struct stat64* found) { CALL(inside(AT_FDCWD, path), 0, EIO, REAL(stat64)(path, found)) }
int lstat64(const char* path, struct stat64* found) { CALL(inside(AT_FDCWD, path), 0, EIO, REAL(lstat64)(path, found)) }
int fstat64(int fd, struct stat64* found) { CALL(is_watched(fd), 0, EIO, REAL(fstat64)(fd, found)) }
int fstatat64(int at, const char* path, struct stat64* found, int flags) {
  CALL(inside(at, path), 0, EIO, REAL(fstatat64)(at, path, found, flags))
}
ssize_t readlink(const char* path, char* buffer, size_t size) {
  CALL(inside(AT_FDCWD, path), 0, EIO, REAL(readlink)(path, buffer, size))
}

DIR* opendir(const char* path) {
  enum kind what = inside(AT_FDCWD, path) ? next(0) : NONE;
  if (what == FAIL) {
    errno = EIO;
    return NULL;
  }
  DIR* result = REAL(opendir)(path);
  after(what);
  return result;
}
