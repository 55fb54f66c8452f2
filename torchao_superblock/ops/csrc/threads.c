/* Threads and their scratch.
 *
 * torch brings its own OpenMP runtime, whose idle threads spin for a while after every parallel region.
 * A second pool of threads would fight with them for the same cores, so the pool of torch is borrowed:
 * `GOMP_parallel`, the stable entry point behind `#pragma omp parallel` (libgomp, and libomp and
 * libiomp5 as well), is looked up in the dependencies of libtorch_cpu. Where there is none, threads
 * are started for the call.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <pthread.h>
#include <stdlib.h>

#include "internal.h"

typedef void (*gomp_parallel_fn)(void (*)(void *), void *, unsigned, unsigned);

static gomp_parallel_fn gomp_parallel;
static pthread_key_t scratch_key;
static pthread_once_t once = PTHREAD_ONCE_INIT;
static int have_key;
/* Set in a forked child: the parent's pool of threads does not exist there, and libgomp would wait for
 * it for ever. */
static atomic_int in_forked_child;

typedef struct {
    void *memory[SB_N_SCRATCH];
    size_t bytes[SB_N_SCRATCH];
} scratch;

static void free_scratch(void *pointer) {
    scratch *s = pointer;
    for (int i = 0; i < SB_N_SCRATCH; i++) free(s->memory[i]);
    free(s);
}

void sb_run_on_one_thread(void) { atomic_store(&in_forked_child, 1); }

static void watch_forks(void) { pthread_atfork(NULL, NULL, sb_run_on_one_thread); }

void sb_watch_forks(void) {
    static pthread_once_t watched = PTHREAD_ONCE_INIT;
    pthread_once(&watched, watch_forks);
}

static void initialize(void) {
    have_key = pthread_key_create(&scratch_key, free_scratch) == 0;
    sb_watch_forks();
#ifdef RTLD_NOLOAD
    static const char *const libraries[] = {"libtorch_cpu.so", "libtorch_cpu.dylib"};
    for (size_t i = 0; i < sizeof libraries / sizeof *libraries && !gomp_parallel; i++) {
        void *torch = dlopen(libraries[i], RTLD_LAZY | RTLD_NOLOAD);
        if (torch) *(void **)&gomp_parallel = dlsym(torch, "GOMP_parallel");
    }
#endif
}

void *sb_scratch(int which, size_t bytes) {
    pthread_once(&once, initialize);
    if (!have_key) return NULL;
    scratch *s = pthread_getspecific(scratch_key);
    if (!s) {
        s = calloc(1, sizeof *s);
        if (!s) return NULL;
        if (pthread_setspecific(scratch_key, s)) {
            free(s);
            return NULL;
        }
    }
    if (s->bytes[which] < bytes) {
        free(s->memory[which]);
        s->bytes[which] = 0;
        if (posix_memalign(&s->memory[which], 64, bytes)) {
            s->memory[which] = NULL;
            return NULL;
        }
        s->bytes[which] = bytes;
    }
    return s->memory[which];
}

typedef struct {
    void (*body)(void *);
    void *job;
} call;

static void *run_call(void *pointer) {
    call *c = pointer;
    c->body(c->job);
    return NULL;
}

enum { MAX_STARTED = 63 };

void sb_parallel(void (*body)(void *), void *job, int threads) {
    pthread_once(&once, initialize);
    if (threads <= 1 || atomic_load(&in_forked_child)) {
        body(job);
        return;
    }
    if (gomp_parallel) {
        gomp_parallel(body, job, (unsigned)threads, 0);
        return;
    }
    pthread_t started[MAX_STARTED];
    int n = 0;
    call c = {body, job};
    while (n < threads - 1 && n < MAX_STARTED && !pthread_create(&started[n], NULL, run_call, &c)) n++;
    body(job);
    while (n > 0) pthread_join(started[--n], NULL);
}

const char *sb_threading(void) {
    pthread_once(&once, initialize);
    return gomp_parallel ? "openmp (shared with torch)" : "pthread";
}
