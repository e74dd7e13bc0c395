/* A disk of SLOW_MBS MB/s: what a process writes in 64 KiB or more waits for its turn, all threads together.

   cc -O2 -shared -fPIC -o slow_disk.so slow_disk.c -ldl && SLOW_MBS=300 LD_PRELOAD=./slow_disk.so program */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <pthread.h>
#include <stdlib.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

static pthread_mutex_t disk = PTHREAD_MUTEX_INITIALIZER;

static void wait_for_disk(size_t bytes) {
  const char *rate = getenv("SLOW_MBS");
  if (bytes < 65536 || !rate) return;
  double seconds = bytes / (atof(rate) * 1e6);
  struct timespec pause = {(time_t)seconds, (long)((seconds - (time_t)seconds) * 1e9)};
  pthread_mutex_lock(&disk);
  nanosleep(&pause, NULL);
  pthread_mutex_unlock(&disk);
}

static size_t total(const struct iovec *parts, int count) {
  size_t bytes = 0;
  for (int i = 0; i < count; i++) bytes += parts[i].iov_len;
  return bytes;
}

#define REAL(name) __typeof__(name) *real = (__typeof__(name) *)dlsym(RTLD_NEXT, #name)

ssize_t write(int file, const void *data, size_t bytes) {
  REAL(write);
  wait_for_disk(bytes);
  return real(file, data, bytes);
}

ssize_t pwrite(int file, const void *data, size_t bytes, off_t offset) {
  REAL(pwrite);
  wait_for_disk(bytes);
  return real(file, data, bytes, offset);
}

ssize_t writev(int file, const struct iovec *parts, int count) {
  REAL(writev);
  wait_for_disk(total(parts, count));
  return real(file, parts, count);
}

ssize_t pwritev(int file, const struct iovec *parts, int count, off_t offset) {
  REAL(pwritev);
  wait_for_disk(total(parts, count));
  return real(file, parts, count, offset);
}
