/* rope.c: rotary position embedding (RoFormer, arXiv 2104.09864): inverse frequencies and the table of angles. */
#include "model.h"

#include <math.h>
#include <stdlib.h>

void rast_rope_default(float theta, int32_t head_dim, float *freq) {
    for (int32_t i = 0; i < head_dim / 2; i++) freq[i] = 1.0f / powf(theta, (float)(2 * i) / (float)head_dim);
}

/* The angle is the float32 product, as transformers takes it; its cosine and sine are then exact to float32. */
static void fill(const rast_config *c, size_t first, size_t n, float *table) {
    const size_t half = (size_t)c->head_dim / 2;
    const float factor = c->rope_attention == 0.0f ? 1.0f : c->rope_attention;
    for (size_t p = 0; p < n; p++)
        for (size_t i = 0; i < half; i++) {
            const float angle = (float)(first + p) * c->rope_freq[i];
            table[(p * half + i) * 2] = (float)cos((double)angle) * factor;
            table[(p * half + i) * 2 + 1] = (float)sin((double)angle) * factor;
        }
}

int rast_rope_extend(rast_model *m, rast_class *cls, size_t n_positions, rast_error *err) {
    enum { PIECE = 256 };
    if (n_positions <= cls->rope_len) return RAST_OK;
    const rast_config *c = &m->nets[cls->first_net].config;
    const size_t row = (size_t)c->head_dim * sizeof(float);
    float *piece = malloc(PIECE * row);
    if (!piece) return rast_fail(err, RAST_ERR_MEMORY, "no memory for %d rows of the rope table", PIECE);
    int status = RAST_OK;
    while (status == RAST_OK && cls->rope_len < n_positions) {
        size_t n = (size_t)cls->max_context - cls->rope_len;
        if (n > PIECE) n = PIECE;
        fill(c, cls->rope_len, n, piece);
        rast_event event;
        m->ops->begin(m->upload, 0);
        m->ops->copy(m->upload, cls->rope + cls->rope_len * row, (rast_dev)(uintptr_t)piece, n * row,
                     RAST_COPY_TO_DEVICE);
        status = m->ops->submit(m->upload, &event, err);
        if (status == RAST_OK) status = m->ops->wait(m->ctx, event, err);
        if (status == RAST_OK) cls->rope_len += n;
    }
    free(piece);
    return status;
}
