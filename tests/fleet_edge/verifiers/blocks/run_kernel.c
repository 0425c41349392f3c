/* Runs kernels of another processor on cases from standard input; see test_arm.py. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

typedef void kernel(const uint8_t *, const void *, const float *, float *, int64_t, int64_t);
extern kernel KERNELS;
static kernel *const kernels[] = {KERNELS};

static void *input(size_t size) {
    void *memory = malloc(size);
    if (memory == NULL || fread(memory, 1, size, stdin) != size) exit(2);
    return memory;
}

int main(void) {
    int64_t head[3]; /* rows, blocks, bytes of the tile */
    while (fread(head, sizeof(int64_t), 3, stdin) == 3) {
        uint8_t *tile = input(head[2]);
        void *prepared = input(head[0] * head[1] * 48);
        float *bias = input(32 * sizeof(float));
        float *out = calloc(head[0] * 32, sizeof(float));
        kernels[head[0] - 1](tile, prepared, bias, out, head[1], 32);
        fwrite(out, sizeof(float), head[0] * 32, stdout);
    }
    return 0;
}
