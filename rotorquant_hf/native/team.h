/* Work in items, shared by the threads of a team. */
#ifndef ROTORQUANT_TEAM_H
#define ROTORQUANT_TEAM_H

#include <stdlib.h>

#include "attend.h"

typedef struct {
    void (*step)(void *data, int64_t item, int64_t thread);
    void *data;
    int64_t items, next, threads;
} Shared;

/* What one thread does: items, as long as there are any. */
static void take_items(void *data)
{
    Shared *shared = data;
    int64_t thread = __atomic_fetch_add(&shared->threads, 1, __ATOMIC_RELAXED);
    for (;;) {
        int64_t item = __atomic_fetch_add(&shared->next, 1, __ATOMIC_RELAXED);
        if (item >= shared->items)
            return;
        shared->step(shared->data, item, thread);
    }
}

/* Run a step for every item, on at most so many threads, which are numbered from 0. */
static void share(void (*step)(void *, int64_t, int64_t), void *data, int64_t items, Team team,
                  int threads)
{
    Shared shared = {step, data, items, 0, 0};
    if (team && threads > 1 && items > 1)
        team(take_items, &shared, (unsigned)(threads < items ? threads : items), 0);
    else
        take_items(&shared);
}

typedef struct {
    void (*step)(const void *asked, int64_t item, float *scratch);
    const void *asked;
    int64_t floats;
    float *scratch;
} Scratched;

static inline void take_scratch(void *data, int64_t item, int64_t thread)
{
    const Scratched *work = data;
    work->step(work->asked, item, work->scratch + thread * work->floats);
}

/* The same with so many floats of each thread's own. 0, or -1 if there is no memory. */
static inline int for_each(void (*step)(const void *, int64_t, float *), const void *asked,
                           int64_t items, int64_t floats, Team team, int threads)
{
    Scratched work = {step, asked, (floats + 15) / 16 * 16, NULL};
    work.scratch = aligned_alloc(64, (threads > 1 ? threads : 1) * work.floats * sizeof(float));
    if (!work.scratch)
        return -1;
    share(take_scratch, &work, items, team, threads);
    free(work.scratch);
    return 0;
}

#endif
