/* gather.c: see gather.h. */
#include "gather.h"

py_group *py_gather_open(py_gather *self, uint64_t session, const rast_request *request, size_t n_nets,
                         size_t n_vocab) {
    py_group *group = PyMem_RawCalloc(1, sizeof *group);
    if (group) group->samples = PyMem_RawCalloc(request->n_samples, sizeof *group->samples);
    if (!group || !group->samples) {
        PyMem_RawFree(group);
        return NULL;
    }
    group->session = session;
    group->n = request->n_samples;
    for (uint32_t j = 0; j < group->n; j++)
        group->samples[j] =
            (py_sample){.tag = request->tag, .sample = j, .want = request->want, .n_nets = n_nets, .n_vocab = n_vocab};
    *(self->last ? &self->last->next : &self->first) = group;
    self->last = group;
    return group;
}

py_group *py_gather_find(py_gather *self, uint64_t id) {
    py_group *from = self->found ? self->found : self->first, *group = from;
    while (group && group->id != id) {
        group = group->next ? group->next : self->first;
        if (group == from) group = NULL;
    }
    if (group) self->found = group;
    return group;
}

py_group *py_gather_add(py_gather *self, const rast_chunk *chunk) {
    py_group *group = py_gather_find(self, chunk->id);
    if (!group || chunk->sample >= group->n) return NULL;
    py_sample *sample = &group->samples[chunk->sample];
    if (!sample->lost && py_sample_add(sample, chunk)) {
        py_sample_free(sample);
        sample->lost = 1;
    }
    if (chunk->finish == RAST_RUNNING) return group;
    sample->ended = 1;
    group->n_ended++;
    return group;
}

static void remove_group(py_gather *self, py_group *before, py_group *group) {
    *(before ? &before->next : &self->first) = group->next;
    if (self->last == group) self->last = before;
    self->found = NULL;
    for (uint32_t j = 0; j < group->n; j++) py_sample_free(&group->samples[j]);
    PyMem_RawFree(group->samples);
    PyMem_RawFree(group);
}

static int is_ready(const py_sample *sample, int partial) {
    return !sample->taken && (sample->ended || (partial && sample->fresh.n));
}

size_t py_gather_ready(const py_gather *self, uint64_t session, int partial) {
    size_t n = 0;
    for (const py_group *group = self->first; group; group = group->next)
        for (uint32_t j = 0; j < group->n && group->session == session; j++)
            n += (size_t)is_ready(&group->samples[j], partial);
    return n;
}

int py_gather_take(py_gather *self, uint64_t session, int partial, PyObject *list, const py_state *state) {
    py_group *before = NULL, *next;
    for (py_group *group = self->first; group; group = next) {
        next = group->next;
        for (uint32_t j = 0; j < group->n && group->session == session; j++) {
            py_sample *sample = &group->samples[j];
            if (!is_ready(sample, partial)) continue;
            PyObject *result = py_sample_result(sample, state);
            const int rc = result ? PyList_Append(list, result) : -1;
            Py_XDECREF(result);
            sample->taken = sample->ended;
            group->n_taken += (uint32_t)sample->ended;
            py_sample_free(sample);
            if (rc) return -1;
        }
        if (group->n_taken == group->n)
            remove_group(self, before, group);
        else
            before = group;
    }
    return 0;
}

size_t py_gather_left(const py_gather *self, uint64_t session) {
    size_t n = 0;
    for (const py_group *group = self->first; group; group = group->next)
        if (group->session == session) n += group->n - group->n_ended;
    return n;
}

void py_gather_stop(py_gather *self, uint64_t session) {
    py_group *before = NULL, *next;
    for (py_group *group = self->first; group; group = next) {
        next = group->next;
        for (uint32_t j = 0; j < group->n && group->session == session; j++) {
            py_sample *sample = &group->samples[j];
            if (sample->ended) continue;
            py_sample_free(sample);
            sample->ended = sample->taken = 1;
            group->n_ended++;
            group->n_taken++;
        }
        if (group->n_taken == group->n)
            remove_group(self, before, group);
        else
            before = group;
    }
}

void py_gather_close(py_gather *self, uint64_t session) {
    py_group *before = NULL, *next;
    for (py_group *group = self->first; group; group = next) {
        next = group->next;
        if (group->session == session)
            remove_group(self, before, group);
        else
            before = group;
    }
}

void py_gather_free(py_gather *self) {
    while (self->first) remove_group(self, NULL, self->first);
}
