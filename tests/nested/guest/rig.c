/*
 * What runs inside the virtual machines of this rig, as one static program:
 *
 *   rig guest          in L2: the workload, on the serial console, until it is told to stop
 *   rig check FILE     in L1: is every numbered line there, once, in order?
 *   rig qmp SOCKET CMD in L1: a QMP command, and its answer
 *   rig now            in L1: the wall clock, in nanoseconds
 *
 * The workload, at the same time:
 *   memory   threads that rewrite pages with a seeded pattern and verify all of it again and again
 *   files    a thread that writes files with known content, syncs, drops caches and reads them back
 *   clocks   threads that sleep and look: time never goes back and never leaps
 *   console  numbered lines out, commands in: "ping TOKEN", "stop"
 *
 * What must stay true: a line that begins with "L " has the next number, and nothing else writes to the console while the
 * workload runs. What goes wrong is told at once, in a line that begins with "FAIL ", and in the last line, "END ".
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <sched.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/klog.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <termios.h>
#include <time.h>
#include <unistd.h>

#define PAGE 4096
#define WORDS (PAGE / 8)
#define MEMORY_PAGES 2048          /* of each memory thread: 8 MiB */
#define MEMORY_THREADS 4           /* at most: the guest is small */
#define FILES 12
#define FILE_BYTES (192 * 1024)
#define LEAP_NS 3000000000LL       /* longer than any move here stops the guest */
#define DRIFT_NS 50000000LL        /* of the wall clock against the monotonic one */

static atomic_bool stopping;
static atomic_ulong failures, pages_written, pages_checked, files_checked, looks;
static pthread_mutex_t console = PTHREAD_MUTEX_INITIALIZER;
static unsigned long lines;

static int64_t now(clockid_t clock)
{
    struct timespec t;
    clock_gettime(clock, &t);
    return t.tv_sec * 1000000000LL + t.tv_nsec;
}

static void sleep_ns(long ns)
{
    struct timespec t = { ns / 1000000000, ns % 1000000000 };
    nanosleep(&t, NULL);
}

/* A whole line at once, however little the console takes. */
static void put(const char *text)
{
    size_t left = strlen(text);
    while (left > 0) {
        ssize_t done = write(1, text, left);
        if (done > 0) {
            text += done;
            left -= done;
        }
    }
}

static void say(const char *format, ...)
{
    char text[512];
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    pthread_mutex_lock(&console);
    put(text);
    pthread_mutex_unlock(&console);
}

static void fail(const char *format, ...)
{
    char text[400], line[420];
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    if (atomic_fetch_add(&failures, 1) < 20) {
        snprintf(line, sizeof line, "FAIL %s\n", text);
        say("%s", line);
    }
}

static uint64_t mix(uint64_t x)
{
    x ^= x >> 30;
    x *= 0xbf58476d1ce4e5b9ULL;
    x ^= x >> 27;
    x *= 0x94d049bb133111ebULL;
    return x ^ x >> 31;
}

static void fill(uint64_t *words, size_t count, uint64_t seed)
{
    for (size_t i = 0; i < count; i++)
        words[i] = mix(seed + i);
}

static size_t differs(const uint64_t *words, size_t count, uint64_t seed)
{
    for (size_t i = 0; i < count; i++)
        if (words[i] != mix(seed + i))
            return i;
    return count;
}

/* Page p has been written versions[p] times; what it holds follows from that. The versions are in memory too: they are
 * right only if no write of them was lost, and none is from the future. */
static void *memory(void *argument)
{
    uint64_t thread = (uintptr_t)argument;
    uint64_t *pages = mmap(NULL, MEMORY_PAGES * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    uint32_t *versions = calloc(MEMORY_PAGES, sizeof *versions);
    if (pages == MAP_FAILED || !versions) {
        fail("memory: none");
        return NULL;
    }
#define SEED(p) ((thread << 56) + ((uint64_t)(p) << 32) + ((uint64_t)versions[p] << 12))
    for (size_t p = 0; p < MEMORY_PAGES; p++)
        fill(pages + p * WORDS, WORDS, SEED(p));
    uint64_t random = thread + 1;
    size_t check = 0;
    for (unsigned long turn = 0;; turn++) {
        bool last = stopping;
        size_t checks = last ? MEMORY_PAGES : 12;
        for (size_t i = 0; i < 8 && !last; i++) {
            size_t p = (random = mix(random + turn)) % MEMORY_PAGES;
            versions[p]++;
            fill(pages + p * WORDS, WORDS, SEED(p));
            pages_written++;
        }
        for (size_t i = 0; i < checks; i++) {
            size_t at = differs(pages + check * WORDS, WORDS, SEED(check));
            if (at < WORDS)
                fail("memory: thread %lu page %zu word %zu version %u: %016lx", (unsigned long)thread, check, at,
                     versions[check], pages[check * WORDS + at]);
            check = (check + 1) % MEMORY_PAGES;
            pages_checked++;
        }
        if (last)
            return NULL;
        sleep_ns(20000000);
    }
}

static bool check_file(const char *path, uint64_t seed, uint64_t *buffer)
{
    int file = open(path, O_RDONLY);
    if (file < 0) {
        fail("files: %s: %s", path, strerror(errno));
        return false;
    }
    ssize_t got = read(file, buffer, FILE_BYTES);
    close(file);
    size_t at = got == FILE_BYTES ? differs(buffer, FILE_BYTES / 8, seed) : 0;
    if (got != FILE_BYTES || at < FILE_BYTES / 8) {
        fail("files: %s: %zd bytes, word %zu: %016lx (%s)", path, got, at, got > 0 ? buffer[at] : 0,
             got < 0 ? strerror(errno) : "read");
        return false;
    }
    files_checked++;
    return true;
}

static void drop_caches(void)
{
    int file = open("/proc/sys/vm/drop_caches", O_WRONLY);
    if (file < 0 || write(file, "1", 1) != 1)
        fail("files: caches cannot be dropped");
    close(file);
}

static void *files(void *argument)
{
    (void)argument;
    uint64_t versions[FILES] = { 0 }, *buffer = malloc(FILE_BYTES);
    char path[64], fresh[64];
    for (uint64_t turn = 0;; turn++) {
        bool last = stopping;
        size_t f = turn % FILES;
        snprintf(path, sizeof path, "/mnt/file%zu", f);
        snprintf(fresh, sizeof fresh, "/mnt/fresh%zu", f);
        if (!last) {
            versions[f] = turn + 1;
            fill(buffer, FILE_BYTES / 8, versions[f] << 20);
            int file = open(fresh, O_WRONLY | O_CREAT | O_TRUNC, 0644);
            if (file < 0 || write(file, buffer, FILE_BYTES) != FILE_BYTES || fsync(file) != 0)
                fail("files: %s: %s", fresh, strerror(errno));
            close(file);
            if (rename(fresh, path) != 0)
                fail("files: rename to %s: %s", path, strerror(errno));
        }
        drop_caches();
        for (size_t i = 0; i < FILES; i++) {
            /* The one just written and another; in the end all. */
            if (versions[i] && (last || i == f || i == (f + 5) % FILES)) {
                snprintf(path, sizeof path, "/mnt/file%zu", i);
                check_file(path, versions[i] << 20, buffer);
            }
        }
        if (last)
            return NULL;
        sleep_ns(100000000);
    }
}

/* Looks at all clocks, now on this CPU and now on that. The wall clock is read between two looks at the monotonic one, so
 * that a thread which loses its CPU in between takes no offset for a drift. */
static void *clocks(void *argument)
{
    int cpus = (int)(intptr_t)argument;
    int64_t monotonic = now(CLOCK_MONOTONIC), boot = now(CLOCK_BOOTTIME);
    int64_t least = INT64_MIN, most = INT64_MAX;
    for (unsigned long turn = 0; !stopping; turn++) {
        if (turn % 64 == 0) {
            cpu_set_t set;
            CPU_ZERO(&set);
            CPU_SET(turn / 64 % cpus, &set);
            sched_setaffinity(0, sizeof set, &set);
        }
        int64_t m = now(CLOCK_MONOTONIC), r = now(CLOCK_REALTIME), after = now(CLOCK_MONOTONIC), b = now(CLOCK_BOOTTIME);
        if (m < monotonic || after < m || b < boot)
            fail("clocks: time went back: %lld, %lld, %lld ns; %lld, %lld ns", (long long)monotonic, (long long)m,
                 (long long)after, (long long)boot, (long long)b);
        if (m - monotonic > LEAP_NS)
            fail("clocks: time leapt by %lld ns", (long long)(m - monotonic));
        /* The wall clock is ahead of the monotonic one by at least and at most so much: now, and at every look before. */
        int64_t low = r - after, high = r - m;
        if (turn > 0 && (low > most + DRIFT_NS || high < least - DRIFT_NS))
            fail("clocks: the wall clock is %lld to %lld ns ahead, it was %lld to %lld", (long long)low, (long long)high,
                 (long long)least, (long long)most);
        if (turn == 0 || low > least)
            least = low;
        if (turn == 0 || high < most)
            most = high;
        monotonic = after, boot = b;
        looks++;
        sleep_ns(10000000);
    }
    return NULL;
}

/* Words that a kernel has no reason to say in such a guest. "hrtimer: interrupt took" is not among them: that comes whenever
 * a vCPU loses the only processor while it handles a timer, also long before a move and after it. */
static void check_kernel_log(void)
{
    static const char *const bad[] = {
        "WARNING:", "BUG:", "Oops", "Call Trace", "soft lockup", "hard LOCKUP", "rcu_preempt detected", "rcu_sched",
        "blocked for more than", "Marking clocksource", "unstable", "EXT4-fs error", "EXT4-fs warning", "I/O error",
        "JBD2: ", "Remounting filesystem read-only", "nobody cared", "time jump",
    };
    static char log[1 << 18];
    int length = klogctl(3, log, sizeof log - 1);
    if (length < 0)
        fail("kernel log: %s", strerror(errno));
    int behind = 0;
    for (char *line = strtok(log, "\n"); line; line = strtok(NULL, "\n")) {
        unsigned long before = failures;
        for (size_t i = 0; i < sizeof bad / sizeof *bad; i++)
            /* What Linux thinks of any AMD processor with more than one core that does not say otherwise. */
            if (strstr(line, bad[i]) && !strstr(line, "due to TSCs unsynchronized"))
                fail("kernel log: %s", line);
        /* What comes behind the first of them tells more. */
        if (failures > before && behind == 0)
            behind = 60;
        else if (behind > 1 && behind--)
            say("LOG %s\n", line);
    }
}

static void stop(void)
{
    if (access("/dev/vda", F_OK) == 0 && umount("/mnt") != 0)
        fail("files: unmount: %s", strerror(errno));
    check_kernel_log();
    say("END %s lines=%lu failures=%lu pages=%lu checked=%lu files=%lu looks=%lu\n", failures ? "bad" : "ok", lines,
        failures, pages_written, pages_checked, files_checked, looks);
    tcdrain(1);
    sync();
    sleep_ns(100000000);
    reboot(RB_POWER_OFF);
}

static int guest(void)
{
    struct termios raw;
    if (tcgetattr(0, &raw) == 0) {
        /* Lines in, no echo. */
        raw.c_lflag &= ~(ECHO | ISIG);
        raw.c_oflag &= ~OPOST;
        tcsetattr(0, TCSANOW, &raw);
    }
    int cpus = (int)sysconf(_SC_NPROCESSORS_ONLN);
    pthread_t threads[64];
    int count = 0;
    for (intptr_t cpu = 0; cpu < cpus && cpu < MEMORY_THREADS; cpu++)
        pthread_create(&threads[count++], NULL, memory, (void *)cpu);
    for (int i = 0; i < 2; i++)
        pthread_create(&threads[count++], NULL, clocks, (void *)(intptr_t)cpus);
    bool disk = access("/dev/vda", F_OK) == 0;
    if (disk)
        pthread_create(&threads[count++], NULL, files, NULL);
    else if (getenv("DISK"))
        fail("files: there is no disk");
    say("READY cpus=%d disk=%d\n", cpus, disk);
    fcntl(0, F_SETFL, fcntl(0, F_GETFL) | O_NONBLOCK);
    char command[256];
    size_t length = 0;
    for (;;) {
        lines++;
        say("L %lu written=%lu checked=%lu files=%lu looks=%lu\n", lines, pages_written, pages_checked, files_checked,
            looks);
        for (int i = 0; i < 25; i++) {
            ssize_t got = read(0, command + length, sizeof command - length - 1);
            length += got > 0 ? got : 0;
            command[length] = 0;
            char *end = strchr(command, '\n');
            if (end) {
                *end = 0;
                if (strcmp(command, "stop") == 0)
                    goto stop;
                if (strncmp(command, "ping ", 5) == 0)
                    say("PONG %s lines=%lu wall=%lld failures=%lu\n", command + 5, lines, (long long)now(CLOCK_REALTIME),
                        failures);
                else
                    fail("console: what is %s", command);
                length = 0;
            } else if (length == sizeof command - 1) {
                fail("console: a line without end");
                length = 0;
            }
            sleep_ns(10000000);
        }
    }
stop:
    stopping = true;
    for (int i = 0; i < count; i++)
        pthread_join(threads[i], NULL);
    stop();
    return 0;
}

static int check(const char *path)
{
    FILE *file = fopen(path, "r");
    char line[1024];
    unsigned long expected = 1, number;
    bool ended = false, good = file != NULL;
    while (file && fgets(line, sizeof line, file)) {
        if (sscanf(line, "L %lu ", &number) == 1) {
            if (number != expected) {
                printf("line %lu instead of %lu\n", number, expected);
                good = false;
            }
            if (ended)
                good = false, printf("line %lu after the end\n", number);
            expected = number + 1;
        } else if (strncmp(line, "END ", 4) == 0) {
            ended = true;
            unsigned long said = 0;
            char *at = strstr(line, "lines=");
            if (at)
                said = strtoul(at + 6, NULL, 10);
            if (strncmp(line, "END ok ", 7) != 0 || said != expected - 1)
                good = false;
            fputs(line, stdout);
        } else if (strncmp(line, "FAIL ", 5) == 0 || strstr(line, "Kernel panic") || strstr(line, "Oops")) {
            good = false;
            fputs(line, stdout);
        }
    }
    if (!ended)
        good = false, printf("no end; %lu lines\n", expected - 1);
    return good ? 0 : 1;
}

static int qmp(const char *path, const char *command)
{
    struct sockaddr_un address = { .sun_family = AF_UNIX };
    strncpy(address.sun_path, path, sizeof address.sun_path - 1);
    int fd = socket(AF_UNIX, SOCK_STREAM, 0);
    struct timeval patience = { 20, 0 };
    setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience);
    if (connect(fd, (struct sockaddr *)&address, sizeof address) != 0)
        return perror(path), 1;
    FILE *from = fdopen(fd, "r");
    static char line[1 << 20];
    dprintf(fd, "{\"execute\":\"qmp_capabilities\"}\n%s\n", command);
    for (int answers = 0; fgets(line, sizeof line, from);) {
        bool error = strstr(line, "\"error\"") && !strstr(line, "\"return\"");
        if ((error || strstr(line, "\"return\"")) && ++answers == 2) {
            fputs(line, stdout);
            return error;
        }
    }
    return perror("no answer"), 1;
}

int main(int count, char **words)
{
    const char *what = count > 1 ? words[1] : "";
    if (strcmp(what, "guest") == 0)
        return guest();
    if (strcmp(what, "check") == 0 && count == 3)
        return check(words[2]);
    if (strcmp(what, "qmp") == 0 && count == 4)
        return qmp(words[2], words[3]);
    if (strcmp(what, "now") == 0)
        return printf("%lld\n", (long long)now(CLOCK_REALTIME)), 0;
    fprintf(stderr, "rig guest | check FILE | qmp SOCKET COMMAND | now\n");
    return 2;
}
