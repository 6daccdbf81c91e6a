/* fuzz_pattern.c: any text as a pattern of blocks. What is accepted stays within the limits, and written out name by
 * name it is the same pattern. */
#include "model/pattern.h"
#include "test/fuzz/fuzz.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    static struct pattern p, again;
    static char written[LIMIT_LAYERS * (PATTERN_NAME + 1) + 1];
    char *text = strndup((const char *)data, size), *at = written;
    error err = {0};
    check(text != NULL);
    if (pattern_parse(&p, text, &err) != 0) {
        check_refusal(&err);
        free(text);
        return 0;
    }
    free(text);
    check(p.name_count >= 1 && p.name_count <= LIMIT_BLOCK_KINDS);
    check(p.block_count >= 1 && p.block_count <= LIMIT_LAYERS);
    for (int i = 0; i < p.block_count; i++) {
        check(p.blocks[i] >= 0 && p.blocks[i] < p.name_count);
        at += sprintf(at, "%s ", p.names[p.blocks[i]]);
    }
    check(pattern_parse(&again, written, &err) == 0);
    check(again.block_count == p.block_count && again.name_count == p.name_count);
    check(memcmp(again.blocks, p.blocks, (size_t)p.block_count * sizeof *p.blocks) == 0);
    return 0;
}
