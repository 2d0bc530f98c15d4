/* File handles in a guest, for test/guest/handles.test.ts:
 *   handle save PATH FILE   writes the handle of PATH to FILE
 *   handle open MOUNT FILE  opens it, and prints what is in the file, the names in the directory, or the target of the link
 * An error ends it with its number as the status. */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

static union {
  struct file_handle handle;
  char bytes[sizeof(struct file_handle) + 128];
} h;

static void check(int bad, const char *what) {
  if (!bad) return;
  int error = errno;
  fprintf(stderr, "%s: %s\n", what, strerror(error));
  exit(error);
}

static void save(const char *path, const char *file) {
  int mount;
  h.handle.handle_bytes = 128;
  check(name_to_handle_at(AT_FDCWD, path, &h.handle, &mount, 0) < 0, path);
  FILE *out = fopen(file, "w");
  check(!out || fwrite(&h, sizeof(h), 1, out) != 1 || fclose(out) != 0, file);
}

static void show(const char *mount, const char *file) {
  FILE *in = fopen(file, "r");
  check(!in || fread(&h, sizeof(h), 1, in) != 1, file);
  int at = open(mount, O_RDONLY | O_DIRECTORY);
  check(at < 0, mount);
  struct stat st;
  int fd = open_by_handle_at(at, &h.handle, O_PATH | O_NOFOLLOW);
  check(fd < 0 || fstat(fd, &st) < 0, "open_by_handle_at");
  char text[4096];
  if (S_ISLNK(st.st_mode)) {
    ssize_t n = readlinkat(fd, "", text, sizeof(text));
    check(n < 0, "readlinkat");
    printf("%.*s\n", (int)n, text);
    return;
  }
  fd = open_by_handle_at(at, &h.handle, O_RDONLY);
  check(fd < 0, "open_by_handle_at");
  if (S_ISREG(st.st_mode)) {
    ssize_t n = read(fd, text, sizeof(text));
    check(n < 0, "read");
    printf("%.*s\n", (int)n, text);
    return;
  }
  DIR *directory = fdopendir(fd);
  check(!directory, "fdopendir");
  for (struct dirent *entry; (entry = readdir(directory)) != NULL;)
    if (entry->d_name[0] != '.') printf("%s\n", entry->d_name);
}

int main(int count, char **words) {
  if (count != 4) return 255;
  (strcmp(words[1], "save") == 0 ? save : show)(words[2], words[3]);
  return 0;
}
